"""Tensor, sequence and data parallelism against one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.layouts import configure, difference

TP = "tensor_model_parallel_size"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {TP: 2}),
        (2, {TP: 2, "sequence_parallel": True}),
        (4, {TP: 4}),
        (4, {TP: 4, "sequence_parallel": True}),
        (2, {TP: 2, "sequence_parallel": True, "tp_comm_overlap": True}),
        (2, {"data_parallel_sharding": "replicate"}),
        (2, {"data_parallel_sharding": "optimizer"}),
        (2, {"data_parallel_sharding": "full"}),
        (4, {TP: 2, "sequence_parallel": True, "data_parallel_sharding": "full"}),
        (
            4,
            {
                TP: 2,
                "sequence_parallel": True,
                "tp_comm_overlap": True,
                "data_parallel_sharding": "full",
            },
        ),
        (4, {"data_parallel_sharding": "full", "num_distributed_optimizer_instances": 2}),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure(kind, world, **layout)).failures == []


CP = "context_parallel_size"


@pytest.mark.parametrize("method", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, {CP: 2}), (4, {CP: 2, TP: 2, "sequence_parallel": True}), (4, {CP: 2})],
    ids=str,
)
def test_context_equals_one_process(method: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure("llama", world, cp_comm_type=method, **layout)).failures == []


PP, SCHEDULE = "pipeline_model_parallel_size", "pipeline_schedule"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble", "zbv"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {PP: 2}),
        (4, {PP: 2, TP: 2, "sequence_parallel": True}),
        (4, {PP: 2, "data_parallel_sharding": "full"}),
        (4, {PP: 2, CP: 2, "data_parallel_sharding": "optimizer"}),
    ],
    ids=str,
)
def test_pipeline_equals_one_process(
    kind: str, schedule: str, world: int, layout: dict[str, Any]
) -> None:
    config = configure(kind, world, pipeline_schedule=schedule, **layout)
    assert difference(config).failures == []
