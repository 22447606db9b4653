"""Layouts of the dense decoder families against one process."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.errors import ConfigError
from tests.parallel.layouts import configure, difference

TP, PP, CP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "context"))
CP = "context_parallel_size"
SP = "sequence_parallel"
FAMILIES = ("neox", "qwen3", "gemma", "bloom")
FULL = {"data_parallel_sharding": "full"}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {TP: 2}),
        (4, {TP: 4, SP: True}),
        (2, {PP: 2}),
        (4, {PP: 2, TP: 2, SP: True, "pipeline_schedule": "zbv"}),
        (2, FULL),
        (4, {TP: 2, **FULL, "recompute_granularity": "full", "recompute_method": "uniform"}),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure(kind, world, **layout)).failures == []


@pytest.mark.parametrize("kind", ["neox", "gemma"])
@pytest.mark.parametrize(("world", "layout"), [(2, {CP: 2}), (4, {CP: 2, TP: 2, SP: True})])
def test_context_by_heads_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure(kind, world, cp_comm_type="a2a", **layout)).failures == []


PACKED = {"data.reset_attention_mask": True, "data.reset_position_ids": True}
RELATIVE = {
    "model.position_embedding_type": "relative",
    "model.relative_attention_num_buckets": 4,
    "model.relative_attention_max_distance": 9,
}


@pytest.mark.parametrize("changes", [PACKED, RELATIVE, {"model.window_size": 3}], ids=str)
@pytest.mark.parametrize("layout", [{TP: 2, SP: True}, FULL], ids=str)
def test_biases_on_scores(changes: dict[str, Any], layout: dict[str, Any]) -> None:
    assert difference(configure("bloom", 2, changes, **layout)).failures == []


@pytest.mark.parametrize(
    ("kind", "changes", "layout", "message"),
    [
        ("gemma", {}, {CP: 2}, r"knows no windows \(window_size = 5\). Nearest: a2a"),
        ("gemma", {}, {CP: 2, "cp_comm_type": "all_gather"}, "Nearest: a2a"),
        ("bloom", {}, {CP: 2, "cp_comm_type": "a2a"}, "alibi biases scores.*Nearest: 1"),
        ("bloom", RELATIVE, {PP: 2}, "shares one table among all layers. Nearest: 1"),
    ],
)
def test_refused_layouts(
    kind: str, changes: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(kind, 2, changes, **layout)
