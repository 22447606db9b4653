"""Samples: contents, masks, audit, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mtk.data.gpt_dataset import GPTDataset
from mtk.errors import DataError
from tests.datasets.sources import MemorySource, naive_indices, random_lengths, unique_source


def dataset(source: MemorySource, sequence_length: int, **options: object) -> GPTDataset:
    settings: dict = {"num_samples": None, "seed": 1, "order": "megatron", **options}
    return GPTDataset(
        source, np.arange(len(source)), sequence_length, **settings
    )  # fmt: skip


def test_samples_are_windows_of_the_naive_stream() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        lengths = random_lengths(rng)
        source = unique_source(lengths.tolist())
        size, count = int(rng.integers(1, 20)), int(rng.integers(1, 60))
        chosen = np.flatnonzero(rng.random(len(lengths)) < 0.7).astype(np.int32)
        if lengths[chosen].sum() < 2:
            continue
        found = GPTDataset(source, chosen, size, count, 5, "megatron")
        document, _, shuffle = naive_indices(lengths, chosen, size, count, 5)
        stream = np.concatenate([source.get(d) for d in document])
        assert len(found) == len(shuffle) >= count
        for k, j in enumerate(shuffle):
            sample = found[k]
            assert sample["tokens"].tolist() == stream[j * size : j * size + size].tolist()
            assert sample["labels"].tolist() == stream[j * size + 1 : j * size + size + 1].tolist()
            pieces = found.documents_of(k)
            assert all(piece.length > 0 for piece in pieces)
            parts = [source.get(p.sequence, p.offset, p.length) for p in pieces]
            assert np.concatenate(parts).tolist() == found.token_ids(k).tolist()


def test_types_and_independence_of_items() -> None:
    found = dataset(unique_source([9, 9, 9]), 4)
    sample = found[0]
    assert [sample[key].dtype for key in ("tokens", "labels", "loss_mask")] == [
        *(np.int64, np.int64, np.float32)
    ]
    assert all(sample[key].shape == (4,) for key in sample)
    sample["tokens"][:] = -1
    assert (sample["labels"] != -1).all()
    assert (found[0]["tokens"] != -1).all()
    assert (found[0]["labels"] != -1).all()


def test_eod_mask_is_where_the_input_is_eod() -> None:
    source = MemorySource([np.array([1, 2, 0]), np.array([3, 0]), np.array([4, 5, 6, 0])])
    plain = dataset(source, 8)[0]
    assert plain["loss_mask"].tolist() == [1.0] * 8
    masked = dataset(source, 8, eod=0, eod_mask_loss=True)[0]
    assert masked["loss_mask"].tolist() == [float(token != 0) for token in masked["tokens"]]
    assert 0 in masked["labels"][masked["loss_mask"] == 1]  # the EOD itself is learned
    with pytest.raises(ValueError, match="eod"):
        dataset(source, 8, eod_mask_loss=True)


def test_a_last_sample_that_is_not_full_is_padded_without_loss() -> None:
    source = unique_source([5, 6])
    found = dataset(source, 4, drop_last=False)
    assert len(found) == 3
    assert sum(found[k]["loss_mask"].sum() for k in range(3)) == 10  # every prediction once
    short = next(k for k in range(3) if found[k]["loss_mask"].sum() < 4)
    sample = found[short]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 0]
    assert sample["labels"][2:].tolist() == [0, 0]
    assert sample["tokens"][3] == 0
    assert len(found.token_ids(short)) == 3
    tiny = dataset(unique_source([3]), 8, drop_last=False)
    assert tiny[0]["loss_mask"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [100, -1])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    source = MemorySource([np.array([1, 2, 3]), np.array([4, 5, bad, 6])])
    source.document_indices = np.array([0, 0, 1, 2])  # an empty document lies before
    found = dataset(source, 6, vocab_size=100, name="corpus")
    with pytest.raises(DataError) as caught:
        found[0]
    expected = f"corpus: document 2 (sequence 1), token 2 has id {bad}"
    assert expected in str(caught.value)
    assert "100 ids" in str(caught.value)


def test_files_that_do_not_belong_together_are_refused() -> None:
    source = unique_source([6, 6])
    source.sizes = np.array([6, 9], dtype=np.int32)
    found = dataset(source, 14)
    with pytest.raises(DataError, match=r"sequence 1 has 6 tokens from 0 on where .* 9"):
        found[0]


@pytest.mark.parametrize(
    ("lengths", "length"), [([1], 4), ([0, 0], 4), ([4], 4), ([2, 2], 4), ([], 4)]
)
def test_no_sample_is_an_error(lengths: list[int], length: int) -> None:
    source = MemorySource([np.zeros(n, dtype=np.int64) for n in lengths])
    with pytest.raises(DataError):
        dataset(source, length)


@pytest.mark.parametrize("k", [-1, 12])
def test_positions_outside(k: int) -> None:
    with pytest.raises(IndexError, match="of 12"):
        dataset(unique_source([52]), 4)[k]
