"""Mamba and hybrid models under every technique against one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.layouts import configure, difference

TP, PP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
SP, EP, SHARDING = "sequence_parallel", "expert_model_parallel_size", "data_parallel_sharding"
# Adam divides by each gradient's own size: above this eps rounding is not blown up.
EPS = {"optimizer.adam_eps": 1e-4}


DOCUMENTS = {"data.reset_attention_mask": True}
slow = pytest.mark.slow


@pytest.mark.parametrize("kind", ["mamba", "hybrid"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {TP: 2}),
        (2, {TP: 2, SP: True}),
        # Fewer groups than ranks: B and C are copied, norms span two ranks.
        pytest.param(4, {TP: 4}, marks=slow),
        (4, {TP: 4, SP: True}),
        (2, {PP: 2}),
        (2, {SHARDING: "replicate"}),
        (2, {SHARDING: "optimizer"}),
        (2, {SHARDING: "full"}),
        (2, {CP: 2}),
        pytest.param(4, {CP: 4}, marks=slow),
        pytest.param(4, {CP: 2, TP: 2, SP: True}, marks=slow),
        pytest.param(4, {PP: 2, TP: 2, "pipeline_schedule": "zero-bubble"}, marks=slow),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure(kind, world, EPS, **layout)).failures == []


@pytest.mark.parametrize("layout", [{TP: 2, SP: True}, {CP: 2}], ids=str)
def test_packed_documents(layout: dict[str, Any]) -> None:
    assert difference(configure("hybrid", 2, EPS | DOCUMENTS, **layout)).failures == []


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {EP: 2}),
        (2, {PP: 2}),
        pytest.param(4, {EP: 2, TP: 2, SP: True}, marks=slow),
        pytest.param(4, {EP: 2, CP: 2, SHARDING: "full"}, marks=slow),
    ],
    ids=str,
)
def test_experts_among_the_layers(world: int, layout: dict[str, Any]) -> None:
    assert difference(configure("hybrid-moe", world, EPS, **layout)).failures == []


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    ],
    ids=str,
)
def test_recomputation_changes_nothing(changes: dict[str, Any]) -> None:
    config = configure("hybrid", 2, EPS, **{TP: 2, SP: True}, **changes)
    assert difference(config).failures == []


def test_projections_with_biases_and_convolutions_without() -> None:
    changes = {"model.add_bias_linear": True, "model.mamba_conv_bias": False}
    for layout in ({TP: 4, SP: True}, {CP: 4}):
        assert difference(configure("mamba", 4, EPS | changes, **layout)).failures == []


@slow
@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_schedules(schedule: str) -> None:
    config = configure("hybrid", 2, EPS, **{PP: 2, "pipeline_schedule": schedule})
    assert difference(config).failures == []
