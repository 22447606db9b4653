"""The compiled shuffle is numpy's, number for number, and leaves the generator as numpy does."""

from __future__ import annotations

import numpy as np
import pytest

from mtk.data import gpt_indices, shuffle
from mtk.data.gpt_indices import build_indices, plan_indices
from mtk.data.shuffle import shuffle_in_place
from tests.datasets.sources import naive_indices, random_lengths

pytest.importorskip("numba")
# Around powers of two, where the number of bits changes, and around the state's 624 words.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 623, 624, 625, 1000, 4095, 4096, 4097, 65536, 65537, 300_000)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64])
def test_equals_numpy(dtype: type[np.generic]) -> None:
    for size in SIZES:
        for drawn in (0, 1, 5):
            states = [np.random.RandomState(size + drawn) for _ in range(2)]
            for state in states:
                state.randint(0, 9, drawn)  # a state in the middle of its words
            ours, numpys = (np.arange(size).astype(dtype) for _ in range(2))
            shuffle_in_place(ours, states[0], least=0)
            states[1].shuffle(numpys)
            assert np.array_equal(ours, numpys), (size, drawn)
            assert states[0].randint(1 << 31) == states[1].randint(1 << 31)


def test_a_normal_number_kept_for_later_stays() -> None:
    states = [np.random.RandomState(3) for _ in range(2)]
    for state in states:
        state.standard_normal()  # makes two, and keeps one
    shuffle_in_place(np.arange(100), states[0], least=0)
    states[1].shuffle(np.arange(100))
    assert states[0].standard_normal(3).tolist() == states[1].standard_normal(3).tolist()


def test_a_part_of_an_array_is_shuffled_in_place() -> None:
    ours, numpys = np.arange(100), np.arange(100)
    shuffle_in_place(ours[10:90], np.random.RandomState(5), least=0)
    np.random.RandomState(5).shuffle(numpys[10:90])
    assert np.array_equal(ours, numpys) and ours[:10].tolist() == list(range(10))


def test_short_arrays_and_missing_numba_take_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(shuffle, "_compiled", fail)
    shuffle_in_place(np.arange(100), np.random.RandomState(0))
    monkeypatch.setattr(shuffle, "numba_exists", lambda: False)
    values, wanted = np.arange(100), np.arange(100)
    shuffle_in_place(values, np.random.RandomState(0), least=0)
    np.random.RandomState(0).shuffle(wanted)
    assert np.array_equal(values, wanted)


@pytest.mark.parametrize("block", [1, 3, 16])
def test_compiled_indices_equal_the_naive_algorithm(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Also where rows are made in blocks that begin and end inside documents."""
    monkeypatch.setattr(gpt_indices, "BLOCK", block)
    rng = np.random.default_rng(block)
    for _ in range(60):
        lengths = random_lengths(rng)
        length, samples = int(rng.integers(1, 40)), int(rng.integers(1, 120))
        documents = np.arange(len(lengths), dtype=np.int32)
        plan = plan_indices(int(lengths.sum()), length, samples, order="megatron")
        found = build_indices(lengths, documents, 7, plan, compiled_from=0)
        wanted = naive_indices(lengths, documents, length, samples, 7)
        assert found.document.tolist() == wanted[0]
        assert found.sample.tolist() == wanted[1]
        assert found.shuffle.tolist() == wanted[2]
