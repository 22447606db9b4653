"""Index caches: hits, damage of every kind, concurrent builders, kill -9, no place to write."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtk.data import index_cache
from mtk.data.gpt_dataset import GPTDataset
from mtk.data.index_cache import MARKER, IndexCache
from tests.datasets import cache_process
from tests.datasets.sources import unique_source

WANTED = cache_process.digest(cache_process.build())


class Builder:
    """A build function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"one": np.arange(100, dtype=np.uint32), "none": np.zeros((0, 2), dtype=np.int32)}


def check(arrays: dict, builder: Builder, calls: int) -> None:
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "one": list(range(100)),
        "none": [],
    }
    assert arrays["one"].dtype == np.uint32
    assert builder.calls == calls


def test_second_time_comes_from_disk_read_only(tmp_path: Path) -> None:
    told: list[str] = []
    cache, builder = IndexCache(tmp_path / "c", notify=told.append), Builder()
    check(cache.load_or_build("k", {"a": 1.5, "b": (1,)}, builder), builder, 1)
    arrays = IndexCache(tmp_path / "c").load_or_build("k", {"a": 1.5, "b": (1,)}, builder)
    check(arrays, builder, 1)
    with pytest.raises(ValueError, match="read-only"):
        arrays["one"][0] = 7
    assert len(told) == 1
    assert told[0].startswith("built k index")


def test_another_description_is_another_entry(tmp_path: Path) -> None:
    cache, builder = IndexCache(tmp_path), Builder()
    for description in ({"a": 1}, {"a": 2}, {"b": 1}):
        cache.load_or_build("k", description, builder)
    cache.load_or_build("other", {"a": 1}, builder)
    assert builder.calls == 4


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(entry: Path) -> None:
        path = entry / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "array cut by a byte": edit("one.npy", lambda data: data[:-1]),
    "array empty": edit("one.npy", lambda data: b""),
    "array longer": edit("one.npy", lambda data: data + b"\0"),
    "one bit": edit("one.npy", flip),
    "header": edit("one.npy", lambda data: data.replace(b"<u4", b"<i4")),
    "empty array changed": edit("none.npy", flip),
    "array missing": lambda entry: (entry / "one.npy").unlink(),
    "marker missing": lambda entry: (entry / MARKER).unlink(),
    "marker cut": edit(MARKER, lambda data: data[: len(data) // 2]),
    "marker empty": edit(MARKER, lambda data: b""),
    "marker is a list": edit(MARKER, lambda data: b"[]"),
    "marker of another description": edit(MARKER, lambda data: data.replace(b'"a": 1', b'"a": 2')),
    "marker without files": edit(
        MARKER, lambda data: json.dumps({"content": json.loads(data)["content"]}).encode()
    ),
    "marker leads elsewhere": edit(MARKER, lambda data: data.replace(b'"one"', b'"../one"')),
    "array is a folder": lambda entry: ((entry / "one.npy").unlink(), (entry / "one.npy").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_repaired(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    builder = Builder()
    IndexCache(tmp_path).load_or_build("k", {"a": 1}, builder)
    (entry,) = (p for p in tmp_path.iterdir() if p.is_dir())
    damage(entry)
    told: list[str] = []
    cache = IndexCache(tmp_path, notify=told.append)
    check(cache.load_or_build("k", {"a": 1}, builder), builder, 2)
    assert any("damaged" in message for message in told)
    check(IndexCache(tmp_path).load_or_build("k", {"a": 1}, builder), builder, 2)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [entry]


def test_large_entries_are_hashed_again_only_if_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "HASH_ALWAYS_BELOW", 0)
    cache, builder = IndexCache(tmp_path), Builder()
    cache.load_or_build("k", {}, builder)
    hashed: list[Path] = []
    real = index_cache.sha256_file
    monkeypatch.setattr(index_cache, "sha256_file", lambda p: (hashed.append(p), real(p))[1])
    check(cache.load_or_build("k", {}, builder), builder, 1)
    assert hashed == []
    (path,) = tmp_path.glob("*/one.npy")
    os.utime(path, (1, 1))
    check(cache.load_or_build("k", {}, builder), builder, 1)
    assert hashed == [path]
    path.write_bytes(flip(path.read_bytes()))
    check(cache.load_or_build("k", {}, builder), builder, 2)
    (path,) = tmp_path.glob("*/one.npy")
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    check(cache.load_or_build("k", {}, builder), builder, 3)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    told: list[str] = []
    cache, builder = IndexCache(tmp_path / "file" / "cache", notify=told.append), Builder()
    check(cache.load_or_build("k", {}, builder), builder, 1)
    assert len(told) == 1
    assert "cannot be written to (Not a directory)" in told[0]
    assert "--data-cache-path" in told[0]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    monkeypatch.setattr(index_cache, "_save", full)
    builder = Builder()
    arrays = IndexCache(tmp_path, notify=told.append).load_or_build("k", {}, builder)
    check(arrays, builder, 1)
    assert "No space left" in told[0]
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_an_error_of_the_builder_is_not_hidden(tmp_path: Path) -> None:
    def broken() -> dict:
        raise OSError("the data cannot be read")

    with pytest.raises(OSError, match="the data"):
        IndexCache(tmp_path).load_or_build("k", {}, broken)


def test_dataset_from_cache_equals_dataset_from_memory(tmp_path: Path) -> None:
    source, documents = unique_source([5, 8, 3, 10, 6, 7, 4, 9]), np.arange(8)
    for order in ("megatron", "epochs"):
        cached = [
            GPTDataset(source, documents, 4, 20, 9, order, cache=IndexCache(tmp_path))
            for _ in range(2)
        ]
        plain = GPTDataset(source, documents, 4, 20, 9, order)
        for k in range(len(plain)):
            tokens = [item[k]["tokens"].tolist() for item in (plain, *cached)]
            assert tokens[0] == tokens[1] == tokens[2]
    entries = {p for p in tmp_path.iterdir() if p.is_dir()}
    assert len(entries) == 2
    GPTDataset(source, documents, 4, 22, 9, "epochs", cache=IndexCache(tmp_path))  # same epochs
    assert {p for p in tmp_path.iterdir() if p.is_dir()} == entries
    changes = ({"seed": 8}, {"sequence_length": 5}, {"documents": documents[1:]})
    for count, change in enumerate(changes, start=3):
        options = {"documents": documents, "sequence_length": 4, "num_samples": 20, "seed": 9}
        GPTDataset(source, **{**options, **change}, cache=IndexCache(tmp_path))
        assert sum(p.is_dir() for p in tmp_path.iterdir()) == count


@pytest.mark.parametrize(
    ("lengths", "documents"),
    [([6, 6, 6, 9], [0, 2, 1]), ([6, 6, 6, 9], [2, 1, 0]), ([5, 7, 6, 9], [0, 1, 2])],
    ids=["another order", "backwards", "other lengths"],
)
def test_other_data_of_the_same_size_is_another_entry(
    tmp_path: Path, lengths: list[int], documents: list[int]
) -> None:
    GPTDataset(unique_source([6, 6, 6, 9]), np.arange(3), 4, 9, 1, cache=IndexCache(tmp_path))
    found, plain = (
        GPTDataset(unique_source(lengths), np.array(documents), 4, 9, 1, cache=cache)
        for cache in (IndexCache(tmp_path), None)
    )
    for k in range(len(plain)):
        assert found.documents_of(k) == plain.documents_of(k)


def start(folder: Path, gate: str = "", call: int = 0, lock: str = "lock") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", cache_process.__name__, str(folder), gate, str(call), lock]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)


def result(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def only_whole_entries(folder: Path) -> bool:
    visible = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return all((p / MARKER).is_file() for p in visible)


@pytest.mark.parametrize("before", ["nothing", "damaged"])
@pytest.mark.parametrize("lock", ["lock", "nolock"])
def test_processes_that_start_at_once(tmp_path: Path, lock: str, before: str) -> None:
    folder, gate = tmp_path / "cache", tmp_path / "go"
    if before == "damaged":
        IndexCache(folder).load_or_build("test", {"a": 1}, cache_process.build)
        (entry,) = folder.glob("test-*")
        edit("shuffle.npy", flip)(entry)
    processes = [start(folder, str(gate), 0, lock) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    gate.touch()
    results = [result(process) for process in processes]
    assert {r["digest"] for r in results} == {WANTED}
    if lock == "lock":
        built = [message for r in results for message in r["told"] if "built test" in message]
        assert len(built) == 1  # the others waited
    assert [p.name[:5] for p in folder.iterdir() if p.is_dir()] == ["test-"]


def test_killed_at_every_point_of_a_publication(tmp_path: Path) -> None:
    """3 arrays, marker, folder, rename, parent folder: 7 calls; the eighth never comes."""
    outcomes = []
    for call in range(1, 9):
        folder = tmp_path / str(call)
        process = start(folder, "", call)
        process.communicate(timeout=60)
        outcomes.append(process.returncode)
        assert only_whole_entries(folder)
        told: list[str] = []
        arrays = IndexCache(folder, notify=told.append).load_or_build(
            "test", {"a": 1}, cache_process.build
        )
        assert cache_process.digest(arrays) == WANTED
        assert not any("damaged" in message for message in told)
        assert [p.name[:5] for p in folder.iterdir() if p.is_dir()] == ["test-"]  # no leftovers
    assert outcomes == [-signal.SIGKILL] * 7 + [0]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(20):
        process = start(tmp_path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert only_whole_entries(tmp_path)
        for entry in tmp_path.glob("test-*"):
            if chance.random() < 0.5:
                edit("shuffle.npy", flip)(entry)  # so that the next one has to build again
    assert result(start(tmp_path))["digest"] == WANTED
