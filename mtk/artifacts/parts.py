"""Finished parts of a long work: what a killed run leaves, its successor goes on from.

Beside the output ``P`` grows the hidden folder ``.P.parts``: ``key.json`` says what the work
is, and every finished part is a folder ``00000000``, ``00000001``, ... that one rename put in
place, with its files and ``part.json``. Parts of other work (another key) are thrown away.
One process at a time owns the folder, by a lock on it that dies with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtk.artifacts.publish import write_json_atomically
from mtk.artifacts.staging import sync_folder
from mtk.errors import ArtifactError

KEY, FACTS, LOCK = "key.json", "part.json", "lock"
_GROWING = "growing"


def parts_folder(output: str | Path) -> Path:
    """Where the parts of ``output`` are kept until it is published."""
    output = Path(output)
    return output.with_name(f".{output.name}.parts")


class Parts:
    """The finished parts 0 .. ``len`` - 1 of the work that ``key`` describes.

    facts: of each finished part, the JSON that :meth:`grow` was given (counts, where the
    input stood). Use as a context manager: it holds the lock. Raises ArtifactError if another
    process works on the same output, or the folder cannot be written.
    """

    def __init__(self, output: str | Path, key: str) -> None:
        self.folder = parts_folder(output)
        self._output, self._key = Path(output), key
        self.facts: list[dict[str, Any]] = []
        self._lock = -1

    def __enter__(self) -> Parts:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            self._own()
            self._find()
        except OSError as error:
            self.__exit__()
            raise ArtifactError(f"{self.folder} cannot be written to: {error.strerror}.") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __len__(self) -> int:
        return len(self.facts)

    def part(self, index: int) -> Path:
        """The folder of a finished part."""
        return self.folder / f"{index:08d}"

    @contextmanager
    def grow(self, facts: dict[str, Any]) -> Iterator[Path]:
        """The folder in which the next part is written; it counts once the block ends.

        facts: filled in by the block, saved with the part.
        """
        growing = self.folder / _GROWING
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir()
        yield growing
        _write(growing / FACTS, facts)
        for path in growing.iterdir():
            _sync(path)
        sync_folder(growing)
        growing.rename(self.part(len(self)))
        sync_folder(self.folder)
        self.facts.append(facts)

    def clear(self) -> None:
        """Throw all parts away; the work begins anew. Killed meanwhile, it does so too."""
        (self.folder / KEY).unlink(missing_ok=True)
        self.facts = []
        self._find()

    def remove(self) -> None:
        """Nothing is left: the output is published, or the parts are of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _own(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"another process is working on {self._output} (it holds {self.folder / LOCK}). "
                f"Wait for it, or choose another place for the output."
            ) from None

    def _find(self) -> None:
        key = self.folder / KEY
        if not key.is_file() or _read(key) != {"key": self._key}:
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json_atomically(key, {"key": self._key})
        while (facts := _read(self.part(len(self.facts)) / FACTS)) is not None:
            self.facts.append(facts)


def remove_parts(output: str | Path) -> None:
    """Throw away what a run left that was killed after it had published. Raises ArtifactError if
    another process works on the output."""
    if parts_folder(output).is_dir():
        with Parts(output, "") as parts:
            parts.remove()


def _read(path: Path) -> dict[str, Any] | None:
    """None for what is missing or cut short."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
