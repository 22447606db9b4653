"""Figures of a dataset against the plainest way to count them; what a check refuses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mtk.data import statistics as counting
from mtk.data.dataset_check import check_dataset
from mtk.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from mtk.data.length_plot import draw_lengths
from mtk.data.statistics import document_lengths, lengths_of, statistics
from mtk.errors import ArtifactError, DataError
from stages.preprocess import run
from tests.preprocess.corpora import QUIET, config, jsonl

EOD = 3


def written(folder: Path, dtype: str = "<u2") -> tuple[IndexedDataset, list[list[list[int]]]]:
    """Random documents, some empty, some ended by EOD."""
    rng = np.random.default_rng(4)
    documents = []
    with IndexedDatasetWriter(folder / "d", dtype) as writer:
        for _ in range(200):
            count = int(rng.integers(0, 4))
            sequences = [
                rng.integers(0, 40, int(rng.integers(1, 30))).tolist() for _ in range(count)
            ]
            if sequences and rng.random() < 0.5:
                sequences[-1].append(EOD)
            documents.append(sequences)
            tokens = [i for s in sequences for i in s]
            writer.add_document(np.array(tokens, dtype=np.int64), [len(s) for s in sequences])
    return IndexedDataset(folder / "d"), documents


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, dtype: str) -> None:
    monkeypatch.setattr(counting, "BLOCK", block)
    dataset, documents = written(tmp_path, dtype)
    found = statistics(dataset, vocab_size=30, eod=EOD, common=3)
    flat = [[i for s in d for i in s] for d in documents]
    tokens = [i for d in flat for i in d]
    counts = {i: tokens.count(i) for i in sorted(set(tokens))}
    assert found.tokens == len(tokens) == sum(map(len, flat))
    assert found.bytes == sum((tmp_path / f"d.{end}").stat().st_size for end in ("bin", "idx"))
    assert found.documents.count == 200
    assert found.documents.empty == sum(not d for d in flat)
    assert found.documents.empty_share == found.documents.empty / 200
    assert found.documents.mean == pytest.approx(len(tokens) / 200)
    ordered = sorted(map(len, flat))
    assert found.documents.percentiles[0] == ordered[0]
    assert found.documents.percentiles[50] == ordered[99]
    assert found.documents.percentiles[95] == ordered[189]
    assert found.documents.percentiles[100] == ordered[-1]
    assert found.sequences.count == sum(map(len, documents))
    ids = found.tokens_of
    assert ids is not None and ids.used == len(counts)
    assert ids.outside == sum(n for i, n in counts.items() if i >= 30)
    assert ids.unused == 30 - sum(i < 30 for i in counts)
    assert ids.eod_count == counts[EOD]
    assert ids.unended == sum(bool(d) and d[-1] != EOD for d in flat)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
    assert ids.common == tuple(most)


def test_without_reading_tokens_and_of_nothing(tmp_path: Path) -> None:
    dataset, documents = written(tmp_path)
    assert statistics(dataset, count_tokens=False).tokens_of is None
    assert document_lengths(dataset).tolist() == [sum(map(len, d)) for d in documents]
    assert lengths_of(np.empty(0, dtype=np.int64)).percentiles == {}
    with IndexedDatasetWriter(tmp_path / "none", "<u2") as writer:
        writer.add_document([], [])
    empty = statistics(IndexedDataset(tmp_path / "none"), vocab_size=5, eod=1)
    assert empty.documents.empty == 1 and empty.tokens_of is not None
    assert (empty.tokens_of.unused, empty.tokens_of.eod_count, empty.tokens_of.unended) == (5, 0, 0)


def test_negative_ids_are_counted_as_outside(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", "<i4") as writer:
        writer.add_document([1, -1, 2, -7], [4])
    found = statistics(IndexedDataset(tmp_path / "d"), vocab_size=2).tokens_of
    assert found is not None and (found.outside, found.used) == (3, 2)
    with pytest.raises(DataError, match="2 tokens below 0"):
        check_dataset(str(tmp_path / "d"))


def test_plot(tmp_path: Path) -> None:
    for lengths in (np.array([1, 5, 5, 900, 0]), np.zeros(3, dtype=np.int64)):
        path = tmp_path / "plots" / "l.png"
        draw_lengths(lengths, "d", path)
        assert path.read_bytes()[:4] == b"\x89PNG" and [p.name for p in path.parent.iterdir()] == [
            "l.png"
        ]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    jsonl(tmp_path / "c.jsonl", [{"text": f"words number {n}"} for n in range(20)])
    run(config(tmp_path, append_eod=True), QUIET)
    return tmp_path / "out" / "P_text_document"


def test_a_sound_dataset_passes(prefix: Path) -> None:
    found = check_dataset(str(prefix))
    assert found.documents == 20 and len(found.done) == 5
    dataset = IndexedDataset(prefix)
    ends = dataset.document_indices.tolist()
    assert found.tokens == sum(len(dataset[i]) for a, b in pairwise(ends) for i in range(a, b))


def test_a_changed_token_is_found(prefix: Path) -> None:
    path = prefix.with_name(f"{prefix.name}.bin")
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="changed after it was published"):
        check_dataset(str(prefix))


def test_ids_outside_the_vocabulary_are_found(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtk.data import dataset_check

    monkeypatch.setattr(dataset_check, "verify", lambda _: None)
    path = prefix.with_name(f"{prefix.name}.bin")
    tokens = np.fromfile(path, dtype="<u2")
    tokens[3] = 60_000
    tokens.tofile(path)
    with pytest.raises(DataError, match="1 tokens with ids up to 60000"):
        check_dataset(str(prefix))
