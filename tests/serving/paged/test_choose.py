"""Many rows' tokens chosen at once are those that each row alone would get."""

from __future__ import annotations

import random

import pytest
import torch

from serving.paged import choose as paged_choose
from serving.paged.choose import draw
from serving.sampling import Choice, choose, keep_top_p


def choices(count: int, seed: int) -> list[Choice]:
    chance = random.Random(seed)
    return [
        Choice(
            temperature=chance.choice([1e-3, 0.3, 1.0, 2.5, 100.0]),
            top_k=chance.choice([0, 0, 1, 2, 7, 300, 1000]),
            top_p=chance.choice([1.0, 1.0, 0.0, 0.1, 0.5, 0.95]),
            uniform=chance.random(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_rows_at_once_equal_rows_alone(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    asked = choices(64, seed)
    # Of bf16 with many equal logits: ties are where ways to choose differ.
    logits_BV = (torch.randn(64, 301) * 3).to(dtype)
    alone = [choose(row_V, choice) for row_V, choice in zip(logits_BV, asked, strict=True)]
    assert draw(logits_BV, asked).tolist() == alone
    assert len(set(alone)) > 20


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_distribution(uniform: float) -> None:
    logits_BV = torch.tensor([[-1e4, 0.0, 1.0, -1e4]]).expand(3, 4)
    asked = [Choice(1.0, k, p, uniform) for k, p in ((0, 1.0), (2, 1.0), (0, 0.999))]
    alone = [choose(row_V, choice) for row_V, choice in zip(logits_BV, asked, strict=True)]
    assert draw(logits_BV, asked).tolist() == alone
    assert set(alone) <= {1, 2}


def test_of_nan_comes_a_token_that_exists() -> None:
    """It is the next step's input before the host has seen that it means nothing."""
    logits_BV = torch.full((2, 5), float("nan"))
    found = draw(logits_BV, [Choice(1.0, 0, 1.0, 0.5), Choice(1.0, 2, 0.5, 0.9)])
    assert all(0 <= token < 5 for token in found.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", [2, 4, 32, 300])
def test_a_nucleus_of_candidates_is_that_of_the_sorted_vocabulary(
    candidates: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether candidates are enough or not, with equal logits on both sides of its edge."""
    monkeypatch.setattr(paged_choose, "CANDIDATES", candidates)
    full: list[int] = []
    real = paged_choose._nucleus
    monkeypatch.setattr(
        paged_choose, "_nucleus", lambda x, p: full.append(len(x)) or real(x, p)
    )  # fmt: skip
    torch.manual_seed(candidates)
    rows, kept = 0, set()
    for spread in (0.1, 1.0, 4.0, 30.0):
        scores_DV = (torch.randn(40, 700) * spread).to(dtype).double()
        ps = [0.0, 0.05, 0.5, 0.9, 0.999] * 8
        found_DV = paged_choose._top_p(scores_DV, ps)
        for found_V, scores_V, p in zip(found_DV, scores_DV, ps, strict=True):
            assert torch.equal(found_V, keep_top_p(scores_V, p))
            kept.add(int(found_V.isfinite().sum()))
        rows += len(ps)
    assert 0 < sum(full) < rows, "both ways were taken"
    assert min(kept) == 1 and max(kept) > 500
