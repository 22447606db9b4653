"""The memory formulas under uneven splits, virtual stages, experts, hybrid sharding and
recomputation."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.config import make
from mtk.config.plan import PlanConfig
from mtk.models.build import build_on_meta
from mtk.models.count import parameter_count
from mtk.parallel import planning

MODEL: dict[str, Any] = {
    "num_layers": 10,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "vocab_size": 256,
    "untie_embeddings_and_output_weights": True,
    "precision": "bf16",
    "lr": 1e-4,
}


def plan(**values: Any) -> PlanConfig:
    return make(PlanConfig, **{**MODEL, **values})


def test_uneven_stages_hold_the_whole_model() -> None:
    config = plan(pipeline_model_parallel_size=4, pipeline_split=(1, 4, 3, 2))
    held = [planning.rank_memory(config, stage).parameters for stage in range(4)]
    assert sum(held) == pytest.approx(parameter_count(config.model))
    layer = held[1] - held[2]
    assert held[1] == pytest.approx(4 * layer) and held[0] < held[3]
    # As training balances it: the last one has the output matrix and the loss as well.
    assert planning.split_of(plan(pipeline_model_parallel_size=4)) == (3, 3, 3, 1)
    bert = {"family": "bert", "untie_embeddings_and_output_weights": False}
    assert planning.split_of(plan(pipeline_model_parallel_size=4, **bert)) == (3, 3, 3, 1)
    t5 = {"family": "t5", "decoder_seq_length": config.model.seq_length // 4}
    # Ten layers of the encoder, then ten cheap ones of the decoder.
    assert planning.split_of(plan(pipeline_model_parallel_size=4, **t5)) == (3, 4, 6, 7)


def test_the_v_of_zbv_has_both_ends_on_the_first_rank() -> None:
    config = plan(
        pipeline_model_parallel_size=2,
        pipeline_schedule="zbv",
        pipeline_split=(4, 3, 2, 1),
        global_batch_size=2,
    )
    assert [planning.stages_of(config, rank) for rank in range(2)] == [(0, 3), (1, 2)]
    first, last = (planning.rank_memory(config, rank) for rank in range(2))
    assert first.logits and not last.logits
    assert first.parameters - last.parameters == 2 * 256 * 64
    assert planning.layers_in_flight(config, 0) == planning.layers_in_flight(config, 1) == 10
    tied = plan(
        pipeline_model_parallel_size=2,
        pipeline_schedule="zbv",
        untie_embeddings_and_output_weights=False,
    )
    held = sum(planning.rank_memory(tied, rank).parameters for rank in range(2))
    assert held == pytest.approx(parameter_count(tied.model))  # one matrix, on one rank


def test_a_loop_of_virtual_stages() -> None:
    config = plan(pipeline_model_parallel_size=2, pipeline_split=(3, 3, 2, 2), global_batch_size=2)
    assert [planning.stages_of(config, rank) for rank in range(2)] == [(0, 2), (1, 3)]
    assert planning.layers_in_flight(config, 0) == 5 * 2 * (1 + 1 / 4)


def test_hybrid_sharding_divides_by_one_instance() -> None:
    both = {"gpus": 8, "num_distributed_optimizer_instances": 2}
    memory = planning.rank_memory(plan(data_parallel_sharding="full", **both), 0)
    state = memory.weights + memory.gradients + memory.optimizer
    assert state / memory.parameters == pytest.approx(18 / 4)
    memory = planning.rank_memory(plan(data_parallel_sharding="optimizer", **both), 0)
    state = memory.weights + memory.gradients + memory.optimizer
    assert state / memory.parameters == pytest.approx(6 + 12 / 4)


@pytest.mark.parametrize(
    ("method", "unit", "inputs", "recomputed", "kept_whole"),
    [
        ("uniform", 1, 10, 1, 0),
        ("uniform", 2, 5, 2, 0),
        ("uniform", 4, 3, 4, 0),
        ("block", 1, 1, 0, 9),
        ("block", 4, 4, 0, 6),
        ("block", 10, 10, 1, 0),
    ],
)
def test_full_recomputation(
    method: str, unit: int, inputs: int, recomputed: int, kept_whole: int
) -> None:
    config = plan(recompute_granularity="full", recompute_method=method, recompute_num_layers=unit)
    whole = planning.whole_layer_activations(plan())
    assert whole == planning.layer_activations(plan())
    expected = inputs * 2 * 32 * 64 + (recomputed + kept_whole) * whole
    assert planning.stage_activations(config, 0) == pytest.approx(expected)


def test_recomputation_counts_every_micro_batch_in_flight() -> None:
    config = plan(
        pipeline_model_parallel_size=2,
        pipeline_split=(5, 5),
        global_batch_size=8,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=5,
    )
    whole = planning.whole_layer_activations(config)
    expected = [2 * 2 * 32 * 64 + 5 * whole, 2 * 32 * 64 + 5 * whole]
    assert [planning.stage_activations(config, stage) for stage in range(2)] == expected


def test_stages_hold_the_experts_of_their_own_layers() -> None:
    """The first layers are dense; router and shared expert belong to the others."""
    experts = {
        "num_experts": 8,
        "moe_ffn_hidden_size": 96,
        "add_bias_linear": False,
        "moe_layer_freq": "[0]*3+[1]*7",
        "moe_shared_expert_intermediate_size": 48,
    }
    config = plan(pipeline_model_parallel_size=2, pipeline_split=(5, 5), **experts)
    held = [planning.stage_parameters(config, stage) for stage in range(2)]
    assert [expert for _, expert in held] == [layers * 8 * 2 * 64 * 96 for layers in (2, 5)]
    assert sum(map(sum, held)) == pytest.approx(parameter_count(config.model))
    built = build_on_meta(config.model)
    own = sum(p.numel() for n, p in built.named_parameters() if _at(n, range(5)))
    table = config.model.padded_vocab_size * 64
    # The formula shares learned positions and the final norm out evenly.
    even = (config.model.positions * 64 + 2 * 64) / 2
    assert sum(held[0]) == pytest.approx(own + table + even)


def _at(name: str, layers: range) -> bool:
    return name.startswith("layers.") and int(name.split(".")[1]) in layers


def test_experts_are_shared_over_their_ranks() -> None:
    experts = {"num_experts": 8, "moe_ffn_hidden_size": 96, "add_bias_linear": False}
    config = plan(
        gpus=8, data_parallel_sharding="optimizer", expert_model_parallel_size=4, **experts
    )
    dense, held = planning.stage_parameters(config, 0)
    assert held == 10 * 8 * 2 * 64 * 96 / 4
    assert dense + 4 * held == parameter_count(config.model)
    # Experts shard over the 2 ranks that hold the same ones, the rest over all 8.
    memory = planning.rank_memory(config, 0)
    assert memory.optimizer == pytest.approx(12 * (dense / 8 + held / 2))
