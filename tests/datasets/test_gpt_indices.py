"""The three indices: golden values, the naive algorithm, and the properties of each order."""

from __future__ import annotations

import numpy as np
import pytest

from mtk.data import gpt_indices
from mtk.data.gpt_indices import GPTIndices, Order, build_indices, build_sample_index, plan_indices
from tests.datasets.sources import naive_indices, random_lengths

LENGTHS = np.array([5, 8, 3, 10, 6, 7, 4, 9], dtype=np.int32)
ONE_EPOCH = [
    *([0, 0], [1, 1], [1, 5], [2, 1], [3, 1], [4, 0], [4, 4], [5, 2], [5, 6]),
    *([6, 3], [6, 7], [7, 1], [7, 5]),
]


def build(
    lengths: np.ndarray,
    sequence_length: int,
    num_samples: int | None,
    seed: int = 1234,
    order: Order = "megatron",
    extra_token: int = 1,
    drop_last: bool = True,
) -> GPTIndices:
    documents = np.arange(len(lengths), dtype=np.int32)
    plan = plan_indices(
        int(lengths.sum()),
        sequence_length,
        num_samples,
        order=order,
        extra_token=extra_token,
        drop_last=drop_last,
    )
    return build_indices(lengths, documents, seed, plan)


@pytest.mark.parametrize("order", ["megatron", "epochs"])
def test_golden_one_epoch(order: Order) -> None:
    found = build(LENGTHS, 4, None, order=order)
    assert found.document.tolist() == [2, 1, 6, 0, 4, 5, 3, 7]
    assert found.sample.tolist() == ONE_EPOCH
    assert found.shuffle.tolist() == [10, 3, 5, 11, 4, 8, 0, 2, 6, 9, 7, 1]
    types = (found.document.dtype, found.sample.dtype, found.shuffle.dtype)
    assert types == (np.int32, np.int32, np.uint32)


def test_golden_last_epoch_apart() -> None:
    found = build(LENGTHS, 4, 20)
    assert found.document.tolist() == [2, 1, 6, 0, 4, 5, 3, 7, 5, 0, 3, 4, 2, 6, 1, 7]
    assert found.sample.tolist() == [
        *ONE_EPOCH,
        *([8, 0], [8, 4], [9, 1], [10, 0], [10, 4], [10, 8], [11, 2], [12, 0], [13, 1]),
        *([14, 1], [14, 5], [15, 1], [15, 5]),
    ]
    first = [7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10]
    last = [19, 22, 16, 13, 23, 20, 15, 21, 18, 24, 17, 12, 14]
    assert found.shuffle.tolist() == [*first, *last]


def test_golden_partial_sample_and_no_extra_token() -> None:
    partial = build(LENGTHS, 4, None, drop_last=False)
    assert partial.sample.tolist() == [*ONE_EPOCH, [7, 8]]
    assert partial.shuffle.tolist() == [3, 10, 2, 12, 11, 5, 4, 0, 8, 6, 9, 7, 1]
    assert build(LENGTHS, 4, None, extra_token=0).sample.tolist() == [
        *([0, 0], [1, 1], [1, 5], [2, 1], [3, 1], [3, 5], [4, 4], [5, 2], [5, 6]),
        *([6, 3], [6, 7], [7, 1], [7, 5], [7, 9]),
    ]


def test_equals_the_naive_algorithm() -> None:
    rng = np.random.default_rng(7)
    separate = 0
    for _ in range(400):
        lengths = random_lengths(rng)
        sequence_length = int(rng.integers(1, 60))
        samples = None if rng.random() < 0.3 else int(rng.integers(1, 120))
        extra = int(rng.random() < 0.8)
        drop_last = samples is not None or bool(rng.random() < 0.5)
        seed = int(rng.integers(0, 2**32))
        found = build(lengths, sequence_length, samples, seed, "megatron", extra, drop_last)
        documents = np.arange(len(lengths), dtype=np.int32)
        wanted = naive_indices(lengths, documents, sequence_length, samples, seed, extra, drop_last)
        assert found.document.tolist() == wanted[0]
        assert found.sample.tolist() == wanted[1]
        assert found.shuffle.tolist() == wanted[2]
        plan = plan_indices(
            int(lengths.sum()), sequence_length, samples, order="megatron", extra_token=extra,
            drop_last=drop_last,
        )  # fmt: skip
        separate += len(plan.stretches) == 2
    assert separate > 50  # both branches were met


def stream(found: GPTIndices, lengths: np.ndarray, sequence_length: int, count: int) -> list:
    """Every token of the first samples as (sequence, offset)."""
    starts = np.concatenate([[0], np.cumsum(lengths[found.document])])
    token = [(d, o) for d in found.document.tolist() for o in range(int(lengths[d]))]
    out = []
    for j in found.shuffle[:count].tolist():
        position, offset = found.sample[j].tolist()
        begin = int(starts[position]) + offset
        out.append(token[begin : begin + sequence_length + 1])
    return out


def test_epochs_order_does_not_depend_on_the_length() -> None:
    rng = np.random.default_rng(11)
    differs = 0
    for _ in range(150):
        lengths = random_lengths(rng)
        sequence_length = int(rng.integers(1, 50))
        seed = int(rng.integers(0, 2**31))
        small, large = sorted(rng.integers(1, 200, size=2).tolist())
        first = build(lengths, sequence_length, small, seed, "epochs")
        second = build(lengths, sequence_length, large, seed, "epochs")
        count = len(first.shuffle)  # all samples that were built, not only those asked for
        assert count >= small
        one = stream(first, lengths, sequence_length, count)
        assert one == stream(second, lengths, sequence_length, count)
        assert all(len(sample) == sequence_length + 1 for sample in one)
        old = [build(lengths, sequence_length, n, seed, "megatron") for n in (small, large)]
        differs += stream(old[0], lengths, sequence_length, small) != stream(
            old[1], lengths, sequence_length, small
        )
    assert differs > 50  # which is what the megatron order does not give


def test_epochs_order_uses_every_token_once_per_epoch() -> None:
    lengths, sequence_length = LENGTHS, 5
    found = build(lengths, sequence_length, 100, order="epochs")
    plan = plan_indices(52, sequence_length, 100, order="epochs")
    assert sorted(found.shuffle.tolist()) == list(range(plan.samples))
    begin = 0
    for epoch, end in enumerate(plan.bounds):
        inside = found.shuffle[begin:end].astype(int)
        assert sorted(inside.tolist()) == list(range(begin, end))
        last_token = inside * sequence_length + sequence_length
        assert set((last_token // 52).tolist()) == {epoch}
        block = found.document[epoch * 8 : epoch * 8 + 8].tolist()
        assert sorted(block) == list(range(8))
        begin = end


def test_epochs_are_shuffled_differently() -> None:
    found = build(np.full(50, 10, dtype=np.int32), 4, 1000, order="epochs")
    blocks = {tuple(found.document[i : i + 50].tolist()) for i in range(0, 400, 50)}
    assert len(blocks) == 8


def test_documents_longer_than_all_samples_and_sequences_longer_than_the_data() -> None:
    one = build(np.array([1000], dtype=np.int32), 8, None)
    assert one.sample[:, 1].tolist() == list(range(0, 1000, 8))[: len(one.sample)]
    many = build(np.array([2], dtype=np.int32), 8, 3, order="epochs")
    assert len(many.shuffle) >= 3


def test_wide_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_indices, "INT32_MAX", 5)
    monkeypatch.setattr(gpt_indices, "UINT32_MAX", 5)
    wide = build(LENGTHS, 4, 20)
    monkeypatch.undo()
    narrow = build(LENGTHS, 4, 20)
    for name in ("document", "sample", "shuffle"):
        assert getattr(wide, name).dtype == np.int64
        assert getattr(wide, name).tolist() == getattr(narrow, name).tolist()


def test_offsets_beyond_int32_tokens() -> None:
    """2^31 tokens and more in a stream: positions are counted in 64 bits."""
    lengths = np.full(5, 2**30, dtype=np.int32)
    plan = plan_indices(5 * 2**30, 2**28, None, order="megatron")
    rows = build_sample_index(lengths, np.arange(5, dtype=np.int32), plan)
    assert plan.samples == 19
    assert rows[-1].tolist() == [4, 3 * 2**28]
    assert rows.dtype == np.int32


@pytest.mark.parametrize("arguments", [(0, 4, None), (5, 0, None)])
def test_impossible_plans(arguments: tuple[int, int, int | None]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_indices(*arguments, order="epochs")
