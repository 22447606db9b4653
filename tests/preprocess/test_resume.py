"""A killed run is continued by the same command, to the same bytes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtk.artifacts.parts import Parts, parts_folder
from mtk.data import corpus_encoding, sources
from mtk.data.corpus_encoding import CorpusParts
from mtk.errors import ArtifactError, ConfigError
from stages import preprocess
from tests.preprocess.corpora import QUIET, TEXTS, command, config, contents, corpus, jsonl

PIECE = 700  # bytes of records a part, and half of it a chunk


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_encoding, "PART_BYTES", PIECE)
    monkeypatch.setattr(sources, "CHUNK_BYTES", PIECE // 2)


def run(folder: Path, name: str, **values: Any) -> dict[str, bytes]:
    """What is written to the folder ``name`` (plain names: without those of the input)."""
    preprocess.run(config(folder, output_prefix=str(folder / name / "P"), **values), QUIET)
    return contents(folder / name)


def interrupt_after(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CorpusParts.add
    left = parts

    def add(self: CorpusParts, *arguments: Any, **options: Any) -> bool:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return original(self, *arguments, **options)

    monkeypatch.setattr(CorpusParts, "add", add)


def files(folder: Path, kind: str) -> tuple[str, ...]:
    """The same texts, some of them bad records, in two files of a kind."""
    records = [{"text": text or "x"} for text in TEXTS * 3]
    lines = [json.dumps(record) for record in records]
    paths = [folder / f"{name}{kind}" for name in "ab"]
    for path, part in zip(paths, (lines[:100], lines[100:]), strict=True):
        bad = [*part[:30], "{", *part[30:60], "[]", *part[60:]]
        if kind == ".jsonl":
            path.write_text("\ufeff" + "\n".join(bad) + "\n")
        elif kind == ".jsonl.gz":
            path.write_bytes(gzip.compress("\r\n".join(bad).encode()))
        elif kind == ".jsonl.zst":
            zstandard = pytest.importorskip("zstandard")
            path.write_bytes(zstandard.compress("\n".join(bad).encode()))
        elif kind == ".json":
            path.write_text("[" + ",\n".join([*part[:30], "5", *part[30:]]) + "]")
        elif kind == ".txt":
            path.write_text("\n\n  \n".join(f"two\nlines {i} {x}" for i, x in enumerate(part)))
        else:
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            texts = [json.loads(line)["text"] for line in part]
            parquet.write_table(pyarrow.table({"text": [*texts, None]}), path, row_group_size=40)
    return tuple(map(str, paths))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (".jsonl", "file"),
        (".jsonl.gz", "file"),
        (".jsonl.zst", "file"),
        (".json", "file"),
        (".txt", "blank-line"),
        (".txt", "line"),
        (".txt", "file"),
        (".parquet", "file"),
    ],
)
def test_goes_on_in_every_format(
    kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "input": files(tmp_path, kind),
        "text_documents": how,
        "on_bad_line": "skip",
        "append_eod": True,
    }
    whole = run(tmp_path, "whole", **values)
    assert ("P.bad_lines.jsonl" in whole) == (kind != ".txt")
    for stop in (1,) if how == "file" and kind == ".txt" else (1, 3, 8):
        name = f"again{stop}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(stop, patch)
            run(tmp_path, name, **values)
        kept = sorted(path.name for path in parts_folder(tmp_path / name / "P").iterdir())
        assert f"{stop - 1:08d}" in kept
        read = counted_records(monkeypatch)
        assert run(tmp_path, name, **values) == whole
        total = len(list(sources.read_chunks(inputs(values), ["text"], how)))  # type: ignore[arg-type]
        assert len(read) < total
        assert not parts_folder(tmp_path / name / "P").exists()


def inputs(values: dict[str, Any]) -> list[Path]:
    return [Path(name) for name in values["input"]]


def counted_records(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every chunk that is encoded."""
    read: list[int] = []
    original = sources.read_chunks

    def counting(*arguments: Any, **options: Any) -> Iterator[Any]:
        for chunk in original(*arguments, **options):
            read.append(len(chunk.records))
            yield chunk

    monkeypatch.setattr(preprocess, "read_chunks", counting)
    return read


# Where the process kills itself: name -> patch applied before the stage runs.
MOMENTS = {
    "between parts": "after(CorpusParts, 'add', 3)",
    "inside a part": "after(GrowingDataset, 'add_documents', 9)",
    "tokens are on the disk, the part is not": "after(GrowingDataset, 'finish_part', 3)",
    "before the part is renamed": "before(parts, 'sync_folder', 5)",
    "while it publishes": "after(GrowingDataset, 'publish', 1)",
    "published, parts not yet removed": "before(Parts, 'remove', 1)",
}
PROGRAM = """
import os, signal, sys
from mtk.artifacts import parts
from mtk.artifacts.parts import Parts
from mtk.cli.main import main
from mtk.data import corpus_encoding, sources
from mtk.data.corpus_encoding import CorpusParts
from mtk.data.growing_dataset import GrowingDataset
corpus_encoding.PART_BYTES, sources.CHUNK_BYTES = 700, 350

def die_at(place, name, count, early):
    original = getattr(place, name)
    def patched(*arguments, **options):
        nonlocal count
        count -= 1
        if early and count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        found = original(*arguments, **options)
        if not early and count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(place, name, patched)

def after(place, name, count): die_at(place, name, count, False)
def before(place, name, count): die_at(place, name, count, True)
exec(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(moment: str, tmp_path: Path) -> None:
    corpus(tmp_path, TEXTS * 3)
    whole = run(tmp_path, "whole")
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, MOMENTS[moment], *command(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert parts_folder(tmp_path / "out/P").is_dir()
    assert run(tmp_path, "out") == whole
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] == "."] == []


def test_parts_of_another_command_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path, TEXTS * 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(3, patch)
        run(tmp_path, "out")
    assert run(tmp_path, "out", append_eod=True) == run(tmp_path, "whole", append_eod=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(3, patch)
        run(tmp_path, "next")
    corpus(tmp_path, TEXTS[::-1] * 3)
    assert run(tmp_path, "next") == run(tmp_path, "reversed")


def test_another_number_of_workers_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path, TEXTS * 3)
    whole = run(tmp_path, "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(3, patch)
        run(tmp_path, "out")
    assert run(tmp_path, "out", workers=2) == whole


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    jsonl(tmp_path / "c.jsonl", [*({"text": "word " * 100} for _ in range(20)), 5])
    from mtk.errors import DataError

    with pytest.raises(DataError, match="line 21"):
        run(tmp_path, "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path, TEXTS * 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(3, patch)
        run(tmp_path, "out")
    os.truncate(parts_folder(tmp_path / "out/P") / "0.bin", 10)
    with pytest.raises(ArtifactError, match="damaged"):
        run(tmp_path, "out")
    run(tmp_path, "out")  # the damage was removed


def test_two_processes_do_not_share_an_output(tmp_path: Path) -> None:
    corpus(tmp_path)
    with Parts(tmp_path / "out/P", "x"), pytest.raises(ArtifactError, match="another process"):
        run(tmp_path, "out")


def test_the_engine_must_serve_the_tokenizer(tmp_path: Path) -> None:
    corpus(tmp_path)
    with pytest.raises(ConfigError, match="not proven"):
        run(tmp_path, "out", tokenizer_engine="words")
    assert list((tmp_path / "out").iterdir()) == []
