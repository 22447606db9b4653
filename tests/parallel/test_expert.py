"""Expert parallelism: a training step against one process; seeded faults must be caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from mtk.config.pretrain import PretrainConfig
from mtk.verification.compare import Tolerance, compare
from mtk.verification.observe import Observation
from tests.parallel.expert_faults import EP, FAULTS, SP, TP
from tests.parallel.layouts import configure, one_process, step_on_rank
from tests.parallel.ranks import run_ranks

SHARDING = "data_parallel_sharding"


def moe_run(world: int, changes: Mapping[str, Any] | None = None, **layout: Any) -> PretrainConfig:
    """A tiny MoE run; losses weigh enough to be seen in the gradients."""
    values = {
        "num_experts": 8,
        "num_layers": 2,
        "moe_ffn_hidden_size": 32,
        "moe_layer_freq": 2,
        "moe_aux_loss_coeff": 0.3,
        "moe_z_loss_coeff": 0.03,
        **(changes or {}),
    }
    # Adam divides by each gradient's own size: above this eps rounding is not blown up.
    own = {f"model.{name}": value for name, value in values.items()} | {"optimizer.adam_eps": 1e-4}
    return configure("llama", world, own, **layout)


def errors(config: PretrainConfig, world: int, fault: str | None = None) -> list[str]:
    """What differs from one process; ranks that fail or disagree count too."""
    single = dataclasses.replace(config, parallel=type(config.parallel)())
    one = one_process(single, 1)
    try:
        ranks = run_ranks(world, faulty_step, config, world, fault)
        found = compare(one, ranks, Tolerance()).failures
    except (AssertionError, ValueError) as error:
        if fault is None:
            raise
        return [str(error)]
    for rank in ranks:
        if rank.balance != pytest.approx(one.balance, rel=1e-6):
            found.append(f"balancing losses {rank.balance}, in one process {one.balance}")
    assert min(one.balance) > 0.1
    return found


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {TP: 2}),
    (2, {TP: 2, SP: True}),
    (2, {EP: 2}),
    (4, {EP: 4, SHARDING: "optimizer"}),
    (4, {EP: 2}),
    (4, {EP: 2, TP: 2}),
    (4, {EP: 2, TP: 2, SP: True}),
    (4, {EP: 2, SHARDING: "full"}),
]


@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_a_step_equals_one_process(
    world: int, layout: dict[str, Any], capacity: float | None
) -> None:
    config = moe_run(world, {"moe_expert_capacity_factor": capacity}, **layout)
    assert errors(config, world) == []


def faulty_step(rank: int, config: PretrainConfig, world: int, fault: str | None) -> Observation:
    if fault is not None:
        FAULTS[fault][1]()
    return step_on_rank(rank, config, world)


def world_of(fault: str) -> int:
    layout = FAULTS[fault][0]
    return int(layout[EP] * layout.get(TP, 1))


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=pytest.mark.slow if world_of(f) > 2 else ()) for f in FAULTS],
)
def test_faults_are_caught(fault: str) -> None:
    world = world_of(fault)
    config = moe_run(world, {"moe_layer_freq": 1}, **FAULTS[fault][0])
    assert errors(config, world, fault) != []
