"""The memory formulas against the papers they follow."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.config import make
from mtk.config.plan import PlanConfig
from mtk.parallel.estimate import length, steps_for
from mtk.parallel.planning import (
    fullest_rank,
    layer_activations,
    layers_in_flight,
    logits,
    rank_memory,
)

# GPT-3 of Korthikanti et al., table 3: micro-batch 1, TP 8.
GPT3: dict[str, Any] = {
    "num_layers": 96,
    "hidden_size": 12288,
    "num_attention_heads": 96,
    "seq_length": 2048,
    "vocab_size": 51200,
    "tensor_model_parallel_size": 8,
    "precision": "bf16",
    "lr": 1e-4,
}
S, B, H, A, T = 2048, 1, 12288, 96, 8


def plan(**values: Any) -> PlanConfig:
    return make(PlanConfig, **{**GPT3, **values})


@pytest.mark.parametrize(
    ("values", "formula"),
    [
        ({}, S * B * H * (10 + 24 / T + 5 * A * S / (H * T))),
        ({"sequence_parallel": True}, S * B * H / T * (34 + 5 * A * S / H)),
        ({"recompute_granularity": "selective"}, S * B * H * (10 + 24 / T)),
        (
            {"sequence_parallel": True, "recompute_granularity": "selective"},
            S * B * H * 34 / T,
        ),
        ({"recompute_granularity": "full", "recompute_method": "uniform"}, 2 * S * B * H),
        ({"attention_backend": "flash"}, S * B * H * (10 + 24 / T)),
        ({"tensor_model_parallel_size": 1}, S * B * H * (34 + 5 * A * S / H)),
    ],
)
def test_activations_equal_table_2(values: dict[str, Any], formula: float) -> None:
    assert layer_activations(plan(**values)) == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize(
    ("precision", "sharding", "per_parameter"),
    [
        ("bf16", "replicate", 18),
        ("bf16", "optimizer", 6 + 12 / 4),
        ("bf16", "full", 18 / 4),
        ("fp16", "replicate", 20),
        ("fp16", "optimizer", 4 + 16 / 4),
        ("fp32", "replicate", 16),
        ("fp32", "optimizer", 8 + 8 / 4),
    ],
)
def test_bytes_a_parameter(precision: str, sharding: str, per_parameter: float) -> None:
    config = plan(precision=precision, data_parallel_sharding=sharding, gpus=32)
    memory = rank_memory(config, 0)
    state = memory.weights + memory.gradients + memory.optimizer
    assert state / memory.parameters == pytest.approx(per_parameter)


def test_stages_hold_the_whole_model_between_them() -> None:
    config = plan(pipeline_model_parallel_size=4, untie_embeddings_and_output_weights=True)
    from mtk.models.count import parameter_count

    held = sum(rank_memory(config, stage).parameters * T for stage in range(4))
    assert held == pytest.approx(parameter_count(config.model))


MIXTRAL: dict[str, Any] = {
    "recipe": None,
    "num_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "seq_length": 256,
    "vocab_size": 1000,
    "add_bias_linear": False,
    "num_experts": 8,
    "tensor_model_parallel_size": 1,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "attention_backend": "flash",
}


@pytest.mark.parametrize("sharding", ["replicate", "optimizer", "full"])
def test_experts_are_shared_and_less_sharded(sharding: str) -> None:
    from mtk.models.count import expert_weights

    values = {**MIXTRAL, "gpus": 8, "data_parallel_sharding": sharding}
    whole, shared = plan(**values), plan(**values, expert_model_parallel_size=4)
    experts = expert_weights(whole.model)
    a, b = rank_memory(whole, 0), rank_memory(shared, 0)
    assert a.parameters - b.parameters == pytest.approx(experts * 3 / 4)
    # Sharding over fewer ranks takes back what sharing the experts out has saved.
    saved = experts * 3 / 4 * 12 if sharding == "replicate" else 0.0
    assert a.optimizer - b.optimizer == pytest.approx(saved)


def test_activations_of_experts() -> None:
    dense = plan(**MIXTRAL | {"num_experts": None})
    moe = plan(**MIXTRAL | {"moe_router_topk": 1})
    token = 2 * 512 * 2 + 2 * 4 * 8
    assert layer_activations(moe) - layer_activations(dense) == pytest.approx(256 * token)


def test_first_stage_of_1f1b_keeps_one_microbatch_a_stage() -> None:
    config = plan(pipeline_model_parallel_size=4, global_batch_size=8)
    assert [layers_in_flight(config, stage) for stage in range(4)] == [96, 72, 48, 24]
    interleaved = plan(
        pipeline_model_parallel_size=4,
        global_batch_size=8,
        num_layers_per_virtual_pipeline_stage=12,
    )
    assert layers_in_flight(interleaved, 0) == 96 * (1 + 3 / (4 * 2))
    assert layers_in_flight(plan(pipeline_model_parallel_size=4), 0) == 24  # one micro-batch


def test_logits_count_on_the_last_stage_and_can_decide() -> None:
    config = plan(pipeline_model_parallel_size=2, num_layers=2, vocab_size=5_120_000)
    assert logits(config) == S * B * 5_120_000 * 6 / T
    assert rank_memory(config, 0).logits == 0
    assert fullest_rank(config).stage == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (1, 16)),
        ({"train_iters": 10}, (10, 160)),
        ({"train_samples": 100}, (7, 100)),
        ({"train_tokens": 2048 * 100 - 5}, (7, 100)),
    ],
)
def test_length(values: dict[str, Any], expected: tuple[int, int]) -> None:
    assert length(plan(global_batch_size=16, **values)) == expected


def test_ramp_up_takes_more_steps() -> None:
    config = plan(train_samples=160, global_batch_size=16, rampup_batch_size=[4, 4, 48])
    # 16 samples each at 4, 8, 12 (4 + 2 + 2 steps, the last taking 24), then 16 at a time.
    assert steps_for(160, config.batch, 16) == 4 + 2 + 2 + 7
