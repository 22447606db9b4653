"""Layouts of the dense decoder families against one process."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError
from mtk.models.gpt import GPT
from mtk.parallel import tensor
from mtk.parallel.ranks import Ranks
from mtk.verification.compare import compare
from mtk.verification.observe import Observation, observe, random_sample
from tests.parallel.layouts import configure, difference, step_on_rank
from tests.parallel.ranks import run_ranks

TP, PP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline"))
CP = "context_parallel_size"
SP = "sequence_parallel"
FAMILIES = ("neox", "qwen3", "gemma", "bloom")
FULL = {"data_parallel_sharding": "full"}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {TP: 2}),
        (2, {TP: 2, SP: True}),
        (2, {PP: 2}),
        (2, FULL),
        *(
            pytest.param(4, layout, marks=pytest.mark.slow)
            for layout in (
                # Key/value heads on two ranks each.
                {TP: 4, SP: True},
                {PP: 2, TP: 2, SP: True, "pipeline_schedule": "zbv"},
                {TP: 2, **FULL, "recompute_granularity": "full", "recompute_method": "uniform"},
            )
        ),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure(kind, world, **layout)).failures == []


@pytest.mark.parametrize("kind", ["neox", "gemma"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, {CP: 2}), pytest.param(4, {CP: 2, TP: 2, SP: True}, marks=pytest.mark.slow)],
)
def test_context_by_heads_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure(kind, world, cp_comm_type="a2a", **layout)).failures == []


PACKED = {"data.reset_attention_mask": True, "data.reset_position_ids": True}
RELATIVE = {
    "model.position_embedding_type": "relative",
    "model.relative_attention_num_buckets": 4,
    "model.relative_attention_max_distance": 9,
}


@pytest.mark.parametrize("changes", [PACKED, RELATIVE, {"model.window_size": 3}], ids=str)
@pytest.mark.parametrize("layout", [{TP: 2, SP: True}, {PP: 2}, FULL], ids=str)
def test_biases_on_scores(changes: dict[str, Any], layout: dict[str, Any]) -> None:
    assert difference(configure("bloom", 2, changes, **layout)).failures == []


@pytest.mark.parametrize(
    ("kind", "changes", "layout", "message"),
    [
        ("gemma", {}, {CP: 2}, r"knows no windows \(window_size = 5\). Nearest: a2a"),
        ("gemma", {}, {CP: 2, "cp_comm_type": "all_gather"}, "Nearest: a2a"),
        ("bloom", {}, {CP: 2, "cp_comm_type": "a2a"}, "alibi biases scores.*Nearest: 1"),
    ],
)
def test_refused_layouts(
    kind: str, changes: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(kind, 2, changes, **layout)


def _own_heads_left_out(self: tensor.Cutter, norm: Any, name: str) -> None:
    del self, norm, name


def _first_heads_everywhere(model: GPT, cutter: tensor.Cutter) -> None:
    model.own_heads = slice(0, model.config.num_attention_heads // cutter.ranks.tp.size)
    model.fill_tables(model.alibi_slopes.device)  # type: ignore[arg-type]


FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "gradients of QK norms not summed": (
        "qwen3",
        tensor.Cutter,
        "of_own_heads",
        _own_heads_left_out,
    ),
    "slopes of the first heads everywhere": (
        "bloom",
        tensor,
        "_shard_score_biases",
        _first_heads_everywhere,
    ),
}


def _wrong_step(rank: int, name: str, config: PretrainConfig) -> Observation:
    _, where, attribute, wrong = FAULTS[name]
    with patch.object(where, attribute, wrong):
        return step_on_rank(rank, config, 2)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str) -> None:
    config = configure(FAULTS[name][0], 2, **{TP: 2})
    one = observe(configure(FAULTS[name][0]), random_sample(config), Ranks())
    assert compare(one, run_ranks(2, _wrong_step, name, config)).failures
