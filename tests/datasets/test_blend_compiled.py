"""The compiled loop of a blend gives what the plain rule gives."""

from __future__ import annotations

import numpy as np
import pytest

from mtk.data import blend_indices
from mtk.data.blend_indices import blending_indices, exhaustive_blending_indices
from tests.datasets.sources import naive_blend

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def _always_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def lanes(*_: object) -> None:
        raise AssertionError("not compiled")

    monkeypatch.setattr(blend_indices, "COMPILED_FROM", 0)
    monkeypatch.setattr(blend_indices, "_picks", lanes)


def test_golden() -> None:
    weights = np.array([0.1, 0.2, 0.7])
    wanted = [2, 1, 2, 0, 2, 2, 1, 2, 2, 2, 0, 2, 1, 2, 2, 2, 1, 2, 2, 2]
    assert blending_indices(weights, 20).dataset.tolist() == wanted
    found = exhaustive_blending_indices(np.array([4, 3, 2]))
    assert found.dataset.tolist() == [0, 1, 2, 0, 1, 0, 2, 1, 0]


def test_equals_the_plain_rule() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        count, size = int(rng.integers(1, 20)), int(rng.integers(1, 300))
        weights = rng.random(count) + 0.01
        weights /= weights.sum()
        found = blending_indices(weights, size)
        wanted = naive_blend(weights.tolist(), size)
        assert (found.dataset.tolist(), found.sample.tolist()) == wanted
        sizes = rng.integers(1, 30, count)
        total = int(sizes.sum())
        spent = exhaustive_blending_indices(sizes)
        shares = (sizes / np.float64(total)).tolist()
        assert spent.dataset.tolist() == naive_blend(shares, total, sizes.tolist())[0]


def test_a_spent_dataset_drops_out() -> None:
    """Weights that ask a dataset for more than it has."""
    rng = np.random.default_rng(3)
    for _ in range(100):
        count = int(rng.integers(2, 10))
        weights = rng.random(count) + 0.01
        weights /= weights.sum()
        sizes = rng.integers(1, 30, count)
        total = int(sizes.sum())
        found = blend_indices._indices(weights, sizes, total)
        assert found.dataset.tolist() == naive_blend(weights.tolist(), total, sizes.tolist())[0]
        assert found.counts(count).tolist() == sizes.tolist()
