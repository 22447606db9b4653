"""Mamba and hybrid models under every technique against one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.layouts import configure, difference

TP, PP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
SP, EP, SHARDING = "sequence_parallel", "expert_model_parallel_size", "data_parallel_sharding"
# Adam divides by each gradient's own size: above this eps rounding is not blown up.
EPS = {"optimizer.adam_eps": 1e-4}


@pytest.mark.parametrize("kind", ["mamba", "hybrid"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {TP: 2}),
        (2, {TP: 2, SP: True}),
        # Fewer groups than ranks: B and C are copied, norms span two ranks.
        (4, {TP: 4}),
        (4, {TP: 4, SP: True}),
        (2, {PP: 2}),
        (2, {SHARDING: "replicate"}),
        (2, {SHARDING: "optimizer"}),
        (2, {SHARDING: "full"}),
        (2, {CP: 2}),
        (4, {CP: 4}),
        (4, {CP: 2, TP: 2, SP: True}),
        (4, {PP: 2, TP: 2, "pipeline_schedule": "zero-bubble"}),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure(kind, world, EPS, **layout)).failures == []
