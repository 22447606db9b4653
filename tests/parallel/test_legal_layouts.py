"""All legal layouts: the generator against counting by hand, names, and the pairwise subset."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from mtk.config.model import ModelConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import BatchConfig
from mtk.parallel.legal_layouts import legal_layouts, name, pairwise_subset, techniques

DENSE = ModelConfig(
    num_layers=8,
    hidden_size=96,
    num_attention_heads=24,
    num_query_groups=4,
    ffn_hidden_size=96,
    seq_length=48,
    vocab_size=96,
    make_vocab_size_divisible_by=96,
    attention_dropout=0.0,
)
BATCH = BatchConfig(micro_batch_size=1, global_batch_size=24)


def mixture() -> ModelConfig:
    return replace(DENSE, num_experts=8, moe_ffn_hidden_size=192)


def names(world: int, model: ModelConfig = DENSE) -> list[str]:
    return [name(layout) for layout in legal_layouts(world, model, BATCH)]


def test_one_rank_has_one_layout() -> None:
    assert names(1) == ["single"]


def test_two_ranks_by_hand() -> None:
    assert sorted(names(2)) == sorted(
        [
            "tp2",
            "tp2.sp",
            "pp2.1f1b",
            # 8 layers over 2 ranks: 2 virtual stages each, or 4 of 1 layer.
            "pp2.interleaved",
            "pp2.interleaved.c1",
            "pp2.zero-bubble",
            "pp2.zero-bubble.c1",
            "pp2.zero-bubble.c2",
            "pp2.zbv",
            *(
                f"cp2.{kind}-dp1.{mode}"
                for kind in ("ring", "gather", "a2a")
                for mode in ("replicate", "optimizer", "full")
            ),
            *(f"dp2.{mode}" for mode in ("replicate", "optimizer", "full")),
        ]
    )


def test_experts_multiply_the_layouts() -> None:
    assert {"ep2-dp2.full", "cp2.ring-ep2-dp1.replicate"} <= set(names(2, mixture()))
    assert not any("ep2" in layout for layout in names(4))
    hybrid = [layout for layout in names(4, mixture()) if ".x2" in layout]
    assert "dp4.full.x2" in hybrid and "ep2-dp4.optimizer.x2" in hybrid
    assert not any("ep4" in layout for layout in hybrid)


@pytest.mark.parametrize("world", [2, 4, 6])
def test_names_tell_layouts_apart(world: int) -> None:
    found = names(world, mixture())
    assert len(found) == len(set(found)) > 20


@pytest.mark.parametrize("world", [4, 6])
def test_the_subset_has_every_pair(world: int) -> None:
    layouts = [
        layout for size in range(1, world + 1) for layout in legal_layouts(size, mixture(), BATCH)
    ]
    subset = pairwise_subset(layouts)
    assert _pairs(subset) == _pairs(layouts)
    assert len(subset) < len(layouts) / 5
    shuffled = random.Random(0).sample(layouts, len(layouts))
    assert pairwise_subset(shuffled) == subset


def _pairs(layouts: list[ParallelConfig]) -> set[tuple[str, ...]]:
    return {
        pair
        for layout in layouts
        for size in (1, 2)
        for pair in combinations(sorted(techniques(layout)), size)
    }


def test_a_long_name() -> None:
    layout = ParallelConfig(
        nproc=16,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        pipeline_schedule="interleaved",
        num_layers_per_virtual_pipeline_stage=1,
        context_parallel_size=2,
        expert_model_parallel_size=2,
        data_parallel_sharding="full",
        num_distributed_optimizer_instances=2,
    )
    assert name(layout) == "tp2.sp-pp2.interleaved.c1-cp2.ring-ep2-dp2.full.x2"
