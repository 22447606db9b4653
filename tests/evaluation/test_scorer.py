"""Batches and ranks change nothing: every request is scored once, in its place."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtk.errors import WorkerError
from mtk.evaluation import scorer as module
from mtk.evaluation.perplexity import Settings, token_windows
from mtk.evaluation.scorer import Scorer, digest
from mtk.evaluation.scoring import Request, Scored, batches
from mtk.evaluation.windows import rolling
from mtk.models.gpt import GPT
from mtk.parallel.groups import Group
from tests.convert.models import gpt2_config, llama, loud_model
from tests.parallel.ranks import run_ranks

VOCAB = 300
MODELS = {
    "llama": llama(),
    "learned": gpt2_config(),
    "alibi": gpt2_config(position_embedding_type="alibi"),
    "hybrid": llama(
        num_layers=3,
        hybrid_layer_pattern="M*M",
        mamba_head_dim=16,
        mamba_state_dim=8,
        mamba_num_groups=2,
        mamba_chunk_size=8,
        ffn_hidden_size=None,
    ),
    "experts": llama(num_experts=4, moe_router_topk=2, ffn_hidden_size=32),
}


def requests(count: int = 40, longest: int = 24) -> list[Request]:
    generator = random.Random(5)
    out = []
    for _ in range(count):
        size = generator.randint(2, longest + 1)
        tokens = [generator.randrange(VOCAB) for _ in range(size)]
        out.append(Request(tokens, generator.randint(1, size - 1)))
    return out


def alone(model: GPT, request: Request) -> list[float]:
    """One forward pass of one sequence."""
    tokens = torch.tensor([list(request.tokens)])
    with torch.inference_mode():
        values = model(tokens[:, :-1])[0].double().log_softmax(-1)
    places = range(request.first, len(request.tokens))
    return [float(values[place - 1, tokens[0, place]]) for place in places]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "limits", [{}, {"batch_tokens": 30}, {"batch_size": 1}, {"batch_size": 7}, {"batch_tokens": 1}]
)
def test_scores_are_those_of_each_sequence_alone(name: str, limits: dict[str, int]) -> None:
    model, asked = loud_model(MODELS[name]), requests()
    # In double precision only what is wrong can differ; torch's grouped product has none.
    model, tolerance = (model, 2e-5) if name == "experts" else (model.double(), 5e-6)
    told: list[int] = []
    found = Scorer(model, 0, **limits).score(asked, told.append)
    assert sum(told) == len(asked)
    for request, scored in zip(asked, found, strict=True):
        assert scored.log_probs == pytest.approx(alone(model, request), abs=tolerance)
        assert len(scored.greedy) == len(scored.predicted) == len(request.tokens) - request.first


def test_neighbours_in_a_batch_do_not_matter() -> None:
    model, asked = loud_model(llama()), requests()
    one = Scorer(model, 0, batch_tokens=200).score(asked)
    other = Scorer(model, 17, batch_tokens=200).score(asked[::-1] + asked[:3])[: len(asked)][::-1]
    for a, b in zip(one, other, strict=True):
        # The last bits of fp32: of a logarithm of -15 one is worth 1e-6, and sums are long.
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-5, rel=2e-6)
        assert a.predicted == b.predicted


def test_a_budget_counts_padding() -> None:
    lengths = [9, 1, 5, 5, 3, 20]
    made = [Request(range(n + 1), 1) for n in lengths]
    groups = list(batches(made, 100, 10))
    assert [[lengths[i] for i in g] for g in groups] == [[20], [9], [5, 5], [3, 1]]


def score_on_rank(rank: int, world: int, name: str, limits: dict[str, int]) -> Any:
    group = Group("world")
    if world > 1:
        group = Group("world", tuple(range(world)), rank, dist.group.WORLD)
    scored: list[int] = []
    real = module.score

    def counted(model: GPT, part: Any, pad: int) -> list[Scored]:
        scored.append(len(part))
        return real(model, part, pad)

    module.score = counted  # a rank lives for one job only
    found = Scorer(loud_model(MODELS[name]), 0, world=group, **limits).score(requests())
    return found, sum(scored)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ["llama", "experts"])
def test_ranks_share_the_work_and_agree_bit_for_bit(world: int, name: str) -> None:
    limits = {"batch_tokens": 60}
    (expected, count) = run_ranks(1, score_on_rank, 1, name, limits)[0]
    assert count == 40
    found = run_ranks(world, score_on_rank, world, name, limits)
    assert sum(number for _, number in found) == 40
    assert all(number < 40 for _, number in found)
    assert all(results == expected for results, _ in found)


def disagree(rank: int) -> str:
    group = Group("world", (0, 1), rank, dist.group.WORLD)
    asked = requests()
    if rank == 1:
        asked[3] = Request([*asked[3].tokens[:-1], 7], asked[3].first)
    try:
        Scorer(loud_model(llama()), 0, world=group).score(asked)
    except WorkerError as error:
        return str(error)
    return ""


def test_ranks_with_other_data_are_found_out() -> None:
    assert all("ranks [1] prepared other requests" in text for text in run_ranks(2, disagree))


def test_digest() -> None:
    assert digest([Request([1, 2], 1)]) == digest([Request(np.array([1, 2]), 1)])
    others = [[Request([1, 3], 1)], [Request([1, 2, 3], 1)], [Request([1, 2, 3], 2)], []]
    assert len({digest(other) for other in [[Request([1, 2], 1)], *others]}) == 5
    assert Scorer(loud_model(llama()), 0).score([]) == []


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("targets", [1, 2, 3, 6, 7, 8, 14, 20])
def test_rolling_windows(targets: int, length: int) -> None:
    found = list(rolling(targets, length))
    scored = [w.start + p for w in found for p in range(w.first, w.length)]
    assert scored == list(range(targets))
    assert all(w.length == min(length, targets) for w in found)
    assert len(found) == -(-targets // length)


def test_windows_of_many_sequences_share_batches() -> None:
    model = loud_model(llama())
    sequences = [list(range(3 + n)) for n in range(9)]
    scorer = Scorer(model, 0, batch_tokens=64)
    together = token_windows(scorer, sequences, Settings(8, 3))
    apart = [token_windows(scorer, [s], Settings(8, 3))[0] for s in sequences]
    for a, b in zip(together, apart, strict=True):
        assert [(e["start"], e["scored"]) for e in a] == [(e["start"], e["scored"]) for e in b]
        values = [[e["log_likelihood"] for e in entries] for entries in (a, b)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
