"""Filters against their definitions, the drawn distribution, seeds, ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mtk.errors import ServingError
from serving.sampling import Sampler, SamplingParams, keep_top_k, keep_top_p


def test_top_k_keeps_ties_with_the_kth() -> None:
    kept = keep_top_k(torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]), 2)
    assert torch.isfinite(kept).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize(
    ("p", "kept"), [(0.45, 1), (0.5, 2), (0.55, 2), (0.79, 2), (0.81, 3), (0.999, 4), (1e-9, 1)]
)
def test_top_p_keeps_the_first_over_the_threshold(p: float, kept: int) -> None:
    """Probabilities .5 .3 .15 .05: the token that passes p stays (.5 > .5 is false, so
    at p = .5 the second token stays as well, as in Megatron)."""
    order = [2, 0, 3, 1]
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    scores = torch.empty(4, dtype=torch.float64)
    scores[order] = probabilities.log()
    found = torch.isfinite(keep_top_p(scores, p))
    assert set(found.nonzero().flatten().tolist()) == set(order[:kept])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0])
    sampler = Sampler(SamplingParams(temperature=0.7, seed=1))
    counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(4000)]))
    expected = (logits / 0.7).softmax(-1)
    assert torch.allclose(counts / 4000, expected, atol=0.03)


@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_greedy_forms(params: dict[str, Any]) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert Sampler(SamplingParams(**params)).choose(logits) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("more", [{}, {"top_k": 7}, {"top_p": 0.9}])
def test_no_temperature_is_too_small(temperature: float, more: dict[str, Any]) -> None:
    logits = 20 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1, **more))
    assert {sampler.choose(logits) for _ in range(20)} == {int(logits.argmax())}


def test_filtered_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 1.0, 1.0, -math.inf])
    sampler = Sampler(SamplingParams(seed=0, temperature=50))
    assert {sampler.choose(logits) for _ in range(200)} == {1, 2}


def test_decay_narrows_top_p_down_to_its_bound() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    free = Sampler(SamplingParams(top_p=0.99, top_p_decay=1e-200, seed=0))
    free.choose(logits)
    assert {free.choose(logits) for _ in range(50)} == {0}
    bound = Sampler(SamplingParams(top_p=0.99, top_p_decay=0.1, top_p_bound=0.6, seed=0))
    for _ in range(3):
        bound.choose(logits)
    assert {bound.choose(logits) for _ in range(200)} == {0, 1}


def test_streams_of_samples_differ_and_repeat() -> None:
    def draws(seed: int, sample: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), sample)
        return [sampler.choose(torch.zeros(100)) for _ in range(10)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, sample)) for seed in range(3) for sample in range(3)}) == 9


def test_without_a_seed_every_request_differs() -> None:
    first, second = (Sampler(SamplingParams()) for _ in range(2))
    logits = torch.zeros(1000)
    assert [first.choose(logits) for _ in range(9)] != [second.choose(logits) for _ in range(9)]


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": math.inf}),
        ("top_k", {"top_k": 1001}),
        ("top_p", {"top_p": math.nan}),
        ("top_p", {"top_p": 1.01}),
        ("top_p_decay", {"top_p_decay": 0.5}),
        ("top_p_bound", {"top_p": 0.5, "top_p_bound": 0.6}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63}),
        ("logprobs", {"logprobs": 21}),
    ],
)
def test_ranges(param: str, values: dict[str, Any]) -> None:
    with pytest.raises(ServingError) as caught:
        SamplingParams(**values)
    assert caught.value.param == param
