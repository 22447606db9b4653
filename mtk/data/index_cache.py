"""Index arrays kept on disk: written whole or not at all, and checked before they are used.

An entry is a folder ``{kind}-{hash of the description}`` of ``.npy`` files with a marker
``entry.json``: the description and, for every array, its size and SHA-256. The folder is
filled under another name, flushed to disk and renamed, so that a process killed at any point
leaves nothing that looks like an entry. Any number of processes may ask for the same entry at
once, on one machine or on many that share the folder: they get the same arrays.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.artifacts.hashing import sha256_file, sha256_json
from mtk.artifacts.staging import remove_leftovers, staging_prefix, sync_folder
from mtk.data.mapped import mapped_bytes
from mtk.data.token_source import Notify, ignore

Arrays = dict[str, npt.NDArray[np.integer]]
MARKER = "entry.json"
FORMAT = 1
# Above this, an entry whose files still have the recorded size, time and inode is not hashed
# again: reading 12 GB at every start of every rank would cost more than building anew.
HASH_ALWAYS_BELOW = 1 << 30
# What reading an entry that is not whole may raise.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
PUBLISH_ATTEMPTS = 4
PIECE = 4 << 20  # bytes that are hashed and written at a time


class IndexCache:
    """Caches of index arrays in ``folder`` (made on first use).

    ``notify`` is told when arrays are built, when a damaged entry is replaced, and when the
    folder cannot be written to (the arrays then live in memory only).
    """

    def __init__(self, folder: Path, *, notify: Notify = ignore) -> None:
        self.folder = folder
        self._notify = notify

    def load_or_build(
        self, kind: str, description: Mapping[str, Any], build: Callable[[], Mapping[str, Any]]
    ) -> Arrays:
        """The arrays of ``build()``, from disk if an undamaged entry of this description exists.

        description: plain data that determines the arrays completely. Arrays from disk are
        read-only memory maps.
        """
        content = {"format": FORMAT, "kind": kind, **description}
        entry = self.folder / f"{kind}-{sha256_json(content)[:24]}"
        arrays = self._load(entry, content)
        if arrays is not None:
            return arrays
        with _one_builder(self.folder / f".{entry.name}.lock"):
            # Another process may have built it while this one waited.
            arrays = self._load(entry, content)
            return self._build_and_store(entry, content, build) if arrays is None else arrays

    def _build_and_store(
        self, entry: Path, content: dict[str, Any], build: Callable[[], Mapping[str, Any]]
    ) -> Arrays:
        built = dict(build())
        try:
            _store(entry, content, built)
        except OSError as error:
            self._notify(
                f"{self.folder} cannot be written to ({error.strerror}): index arrays stay in "
                f"memory and are built at every start. Name a writable folder with "
                f"--data-cache-path."
            )
            return built
        self._notify(f"built {content['kind']} index {entry}")
        loaded = self._load(entry, content)
        return built if loaded is None else loaded

    def _load(self, entry: Path, content: Mapping[str, Any]) -> Arrays | None:
        """The arrays of an entry, or None if there is none that can be trusted."""
        if not entry.is_dir():
            return None
        try:
            return _read(entry, content)
        except DAMAGE as error:
            self._notify(f"index cache {entry} is damaged ({error}): it is built again")
            return None


def index_digest(values: npt.NDArray[np.integer]) -> str:
    """SHA-256 of the numbers, whatever their type and byte order."""
    digest = hashlib.sha256()
    for begin in range(0, len(values), 1 << 20):
        digest.update(values[begin : begin + (1 << 20)].astype("<i8").tobytes())
    return digest.hexdigest()


def _read(entry: Path, content: Mapping[str, Any]) -> Arrays:
    marker = json.loads((entry / MARKER).read_text(encoding="utf-8"))
    # The marker went through JSON; so must the description that is compared with it.
    if marker["content"] != json.loads(json.dumps(content)):
        raise ValueError("another description")
    large = sum(record["bytes"] for record in marker["files"].values()) >= HASH_ALWAYS_BELOW
    arrays: Arrays = {}
    for name, record in marker["files"].items():
        if not name.isidentifier():
            raise ValueError(f"array name {name!r}")
        path = entry / f"{name}.npy"
        if path.stat().st_size != record["bytes"]:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes of {record['bytes']}")
        unchanged = large and _stamp(path) == record["stamp"]
        if not unchanged and sha256_file(path) != record["sha256"]:
            raise ValueError(f"{path.name} has another SHA-256")
        arrays[name] = _mapped(path)
    return arrays


def _mapped(path: Path) -> npt.NDArray[np.integer]:
    """What ``numpy.load`` gives, read-only; a map of the file where it is large."""
    with path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{path.name} has version {version} of its format")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        begin = stream.tell()
    if by_columns or dtype.hasobject:
        raise ValueError(f"{path.name} holds {dtype} in another order")
    found: npt.NDArray[np.integer] = mapped_bytes(path)[begin:].view(dtype).reshape(shape)
    return found


def _store(entry: Path, content: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(entry.parent, entry.name)
    folder = entry.parent / f"{staging_prefix(entry.name)}{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        files = {}
        for name, array in arrays.items():
            path = folder / f"{name}.npy"
            digest = _save(path, array)
            files[name] = {
                "bytes": path.stat().st_size,
                "items": int(array.size),
                "sha256": digest,
                "stamp": _stamp(path),
            }
        with (folder / MARKER).open("w", encoding="utf-8") as text:
            json.dump({"content": content, "files": files}, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        sync_folder(folder)
        _publish(folder, entry, content)
        sync_folder(entry.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(path: Path, array: npt.NDArray[np.integer]) -> str:
    """Write a ``.npy`` file to the disk; returns its SHA-256, taken on the way.

    The numbers go out in pieces: reading 12 GB again to hash them would take longer.
    """
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        header = BytesIO()
        np.lib.format.write_array_header_1_0(
            header, np.lib.format.header_data_from_array_1_0(array)
        )
        content = array.reshape(-1).data.cast("B") if array.size else memoryview(b"")
        for piece in (header.getbuffer(), *_pieces(content)):
            digest.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _pieces(content: memoryview) -> Iterator[memoryview]:
    for begin in range(0, len(content), PIECE):
        yield content[begin : begin + PIECE]


def _publish(folder: Path, entry: Path, content: Mapping[str, Any]) -> None:
    """Rename into place, unless another builder has put a good entry there meanwhile."""
    for attempt in range(PUBLISH_ATTEMPTS):
        try:
            folder.rename(entry)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if attempt == PUBLISH_ATTEMPTS - 1:
                raise
        with suppress(*DAMAGE):
            _read(entry, content)
            return
        # Damaged: set aside. Memory maps of its files stay valid after the removal.
        aside = folder.with_name(f"{folder.name}-old")
        with suppress(FileNotFoundError):
            entry.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_mtime_ns, status.st_ino]


@contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """Let one process of this machine build; the lock ends with the process that holds it.

    Only saves work: where locks cannot be had, builders run side by side unharmed.
    """
    with ExitStack() as stack:
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = stack.enter_context(path.open("w"))
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield
