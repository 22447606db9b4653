"""Layers go to stages as asked or by cost; a stage holds its part under global names."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from mtk.config.parallel import ParallelConfig
from mtk.models.build import build_model
from mtk.models.count import flops_per_token
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks
from mtk.parallel.stages import (
    TIED,
    Stages,
    balance,
    cut,
    mark_tied,
    partition,
    placement,
    plan_stages,
    ranges,
)
from tests.parallel.pipelines import TINY


def pipeline(pp: int, **options: object) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=pp, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [0.0, 0.4, 1.7, 5.0, 100.0])
@pytest.mark.parametrize("layers", [4, 7, 9])
def test_partition_is_the_best_of_all(layers: int, last: float) -> None:
    for stages in range(1, layers + 1):
        found = partition([1.0] * layers, stages, first=0.3, last=last)
        assert sum(found) == layers
        assert min(found) >= 1

        def cost(split: tuple[int, ...]) -> float:
            extra = [0.0] * len(split)
            extra[0] += 0.3
            extra[-1] += last
            return max(n + e for n, e in zip(split, extra, strict=True))

        cuts = combinations(range(1, layers), stages - 1)
        splits = (tuple(len(r) for r in ranges(_sizes(c, layers))) for c in cuts)
        assert cost(found) == pytest.approx(min(map(cost, splits)))


def _sizes(cuts: tuple[int, ...], layers: int) -> tuple[int, ...]:
    ends = (0, *cuts, layers)
    return tuple(b - a for a, b in pairwise(ends))


def test_balance_counts_the_head() -> None:
    assert partition([1.0] * 8, 4, first=0.0, last=0.0) == (2, 2, 2, 2)
    large = replace(TINY, num_layers=16, hidden_size=64, vocab_size=50_000)
    split = balance(large, 4)
    assert split[-1] == 1
    assert max(split[:-1]) - min(split[:-1]) <= 1
    none = flops_per_token(replace(large, num_layers=0)).causal
    assert none == 6.0 * large.padded_vocab_size * large.hidden_size
    with pytest.raises(ValueError, match="8 layers do not fill 9 stages"):
        balance(TINY, 9)


def test_plans() -> None:
    assert plan_stages(TINY, pipeline(2)).ranks == (0, 1)
    loop = plan_stages(TINY, pipeline(2, num_layers_per_virtual_pipeline_stage=2))
    assert loop == Stages(ranges((2, 2, 2, 2)), (0, 1, 0, 1))
    assert loop.of(1) == (1, 3)
    uneven = plan_stages(TINY, pipeline(3, pipeline_split=(4, 3, 1)))
    assert uneven.layers == (range(4), range(4, 7), range(7, 8))
    v = plan_stages(TINY, pipeline(2, pipeline_schedule="zbv"))
    assert (v.ranks, v.count) == ((0, 1, 1, 0), 4)
    assert plan_stages(TINY, pipeline(2, pipeline_schedule="interleaved")).count == 4
    assert plan_stages(TINY, pipeline(2, pipeline_schedule="zero-bubble")).count == 2
    assert placement(3, 6, v_shape=False) == (0, 1, 2, 0, 1, 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["learned", "rope"])
def test_stages_hold_every_parameter_once(tied: bool, kind: str) -> None:
    config = replace(
        TINY, untie_embeddings_and_output_weights=not tied, position_embedding_type=kind
    )
    whole = {name: p.shape for name, p in build_model(config).named_parameters()}
    stages = plan_stages(config, pipeline(2, pipeline_split=(3, 2, 2, 1)))
    parts = [module for rank in range(2) for module in cut(config, stages, rank)]
    names = [name for module in parts for name, _ in module.named_parameters()]
    assert set(names) == set(whole)
    twice = [name for name in set(names) if names.count(name) > 1]
    assert twice == ([TIED] if tied else [])
    for module in parts:
        for name, parameter in module.named_parameters():
            assert parameter.is_meta
            assert parameter.shape == whole[name]
    assert [m.first for m in parts] == [True, False, False, False]
    assert [m.last for m in parts] == [False, False, False, True]


def test_a_middle_stage_wants_positions_and_has_no_output() -> None:
    stages = plan_stages(TINY, pipeline(4))
    (middle,) = cut(TINY, stages, 1)
    with pytest.raises(ValueError, match="must be given the positions"):
        middle(torch.zeros(1, 2, 16, device="meta"))
    with pytest.raises(ValueError, match="only the last pipeline stage"):
        middle.output_weight  # noqa: B018


def test_tied_copies_are_noted() -> None:
    ends = Group("ends", (0, 2), 1, None)
    ranks = Ranks(Dims(pp=2, dp=2), rank=2, ends=ends)
    pieces = {TIED: Piece.whole((32, 16)), "x": Piece.whole((2,))}
    loop, v = (plan_stages(TINY, pipeline(2, pipeline_schedule=s)) for s in ("1f1b", "zbv"))
    marked = mark_tied(pieces, TINY, loop, ranks)
    assert marked[TIED].copies == marked[TIED].partial == (ends,)
    assert not marked[TIED].owner
    assert marked["x"] == pieces["x"]
    # Both stages on one rank, a middle rank, or nothing tied: nothing to note.
    assert mark_tied(pieces, TINY, v, ranks) == pieces
    assert mark_tied(pieces, TINY, loop, Ranks()) == pieces
    untied = replace(TINY, untie_embeddings_and_output_weights=True)
    assert mark_tied(pieces, untied, loop, ranks) == pieces
