"""The grammar of --data-path and blending against golden values and the plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from mtk.data import blend_indices
from mtk.data.blend import (
    Blend,
    BlendedDataset,
    blend_index,
    parse_blend,
    target_sizes,
    with_surplus,
)
from mtk.data.blend_indices import BlendIndices, blending_indices, exhaustive_blending_indices
from mtk.data.gpt_dataset import GPTDataset
from mtk.errors import DataError
from tests.datasets.sources import naive_blend, unique_source


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["a"], Blend(("a",), None)),
        (["a", "b", "c"], Blend(("a", "b", "c"), None)),
        (["1", "2", "3"], Blend(("1", "2", "3"), None)),
        (["30", "a", "70", "b"], Blend(("a", "b"), (30.0, 70.0))),
        (["0.3", " a ", "1e1", "b"], Blend(("a", "b"), (0.3, 10.0))),
        (["a", "b"], Blend(("a", "b"), None)),
        (["a", "2", "b", "3"], Blend(("a", "2", "b", "3"), None)),
    ],
)
def test_grammar(items: list[str], expected: Blend) -> None:
    assert parse_blend(items) == expected


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "is empty"),
        (["0.5", "a", "b", "c"], "item 3, 'b', stands where a weight"),
        (["a", "b", "1", "c"], "item 1, 'a'"),
        (["0", "a", "1", "b"], "weight 0 of a must be above zero"),
        (["1", "a", "-2", "b"], "weight -2 of b"),
        (["nan", "a", "1", "b"], "weight nan of a"),
        (["inf", "a", "1", "b"], "weight inf of a"),
        (["1", "a", "2", " "], "prefix is empty"),
        (["a"] * 32769, "at most 32767"),
    ],
)
def test_bad_grammar(items: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_blend(items, "--train-data-path")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.25, 0.25], [0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0]),
        ([0.3, 0.7], [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]),
        ([0.1, 0.2, 0.7], [2, 1, 2, 0, 2, 2, 1, 2, 2, 2, 0, 2, 1, 2, 2, 2, 1, 2, 2, 2]),
    ],
)
def test_golden_blends(weights: list[float], expected: list[int]) -> None:
    found = blending_indices(np.array(weights), len(expected))
    assert found.dataset.tolist() == expected
    assert (found.dataset.dtype, found.sample.dtype) == (np.int16, np.int64)


def test_golden_exhaustive_blend() -> None:
    found = exhaustive_blending_indices(np.array([4, 3, 2]))
    assert found.dataset.tolist() == [0, 1, 2, 0, 1, 0, 2, 1, 0]
    assert found.sample.tolist() == [0, 0, 0, 1, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("lane", [1, 7, 64])
def test_lanes_equal_the_plain_loop(lane: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_indices, "SHORTEST_LANE", lane)
    rng = np.random.default_rng(lane)
    for _ in range(40):
        count = int(rng.integers(1, 9))
        # Equal and round weights make ties, small concentrations make tiny weights.
        weights = [
            rng.dirichlet(np.full(count, 0.2)) + 1e-9,
            rng.integers(1, 5, size=count).astype(np.float64),
            np.full(count, 1.0),
        ][int(rng.integers(3))]
        weights = weights / weights.sum()
        size = int(rng.integers(0, 1500))
        found = blending_indices(weights, size)
        dataset, sample = naive_blend(weights.tolist(), size)
        assert found.dataset.tolist() == dataset
        assert found.sample.tolist() == sample


def test_exhaustive_lanes_equal_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_indices, "SHORTEST_LANE", 3)
    rng = np.random.default_rng(2)
    for _ in range(60):
        sizes = rng.integers(1, 60, size=int(rng.integers(1, 9)))
        found = exhaustive_blending_indices(sizes)
        total = int(sizes.sum())
        dataset, sample = naive_blend((sizes / total).tolist(), total, sizes.tolist())
        assert found.dataset.tolist() == dataset
        assert found.sample.tolist() == sample
        assert found.counts(len(sizes)).tolist() == sizes.tolist()


def test_a_spent_dataset_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rounding of very large sizes leads there; here the weights do not fit the sizes."""
    monkeypatch.setattr(blend_indices, "SHORTEST_LANE", 3)
    weights, limits = np.array([0.5, 0.3, 0.2]), np.array([4, 60, 20])
    found = blend_indices._indices(weights, limits, 70)
    dataset, sample = naive_blend(weights.tolist(), 70, limits.tolist())
    assert found.dataset.tolist() == dataset
    assert found.sample.tolist() == sample
    assert dataset.count(0) == 4


def test_the_beginning_does_not_depend_on_the_size() -> None:
    weights = np.array([0.13, 0.37, 0.5])
    long = blending_indices(weights, 5000)
    for size in (1, 63, 64, 65, 1000, 4999):
        assert blending_indices(weights, size).dataset.tolist() == long.dataset[:size].tolist()


def test_sizes() -> None:
    assert target_sizes(np.array([0.3, 0.7]), 11) == [4, 8]
    assert with_surplus([4, 8, 1000]) == [5, 9, 1005]


def test_blend_index_needs_lengths_to_be_exhaustive() -> None:
    assert len(blend_index(np.array([2, 3]), None, None).dataset) == 5
    with pytest.raises(ValueError, match="needs a size"):
        blend_index(np.array([0.2, 0.8]), None, None)


def blended() -> BlendedDataset:
    parts = [
        GPTDataset(unique_source([n]), np.arange(1), 4, None, 1, name=name)
        for n, name in ((41, "a"), (81, "b"))
    ]
    return BlendedDataset(parts, blending_indices(np.array([0.4, 0.6]), 20))


def test_items_of_a_blend() -> None:
    found = blended()
    assert len(found) == 20
    for k in range(20):
        dataset, sample = found.locate(k)
        item = found[k]
        assert int(item["dataset_id"]) == dataset
        assert item["tokens"].tolist() == found.datasets[dataset][sample]["tokens"].tolist()
        assert found.documents_of(k) == found.datasets[dataset].documents_of(sample)
        assert found.source_of(k) == "ab"[dataset]
    with pytest.raises(IndexError, match="20"):
        found[20]


def test_oversampling_is_refused() -> None:
    parts = blended().datasets
    indices = BlendIndices(np.zeros(11, dtype=np.int16), np.arange(11))
    with pytest.raises(DataError, match="a: the blend asks for 11 samples of 10"):
        BlendedDataset(parts, indices)
