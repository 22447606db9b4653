"""Rules that tie a layout to the number of ranks and to the batch, and where both come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING

from mtk.config.layout_rules import (
    divisors,
    experts,
    multiples,
    nearest,
    stacked_layers,
    tensor_degrees,
)
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig
    from mtk.config.parallel import ParallelConfig
    from mtk.config.pretrain import BatchConfig

DEGREES = {
    "tensor_model_parallel_size": "--tp",
    "pipeline_model_parallel_size": "--pp",
    "context_parallel_size": "--cp",
}


def world_size(nproc: int, environment: Mapping[str, str] = os.environ) -> int:
    """Ranks of the run: what torchrun started, else ``nproc``."""
    started = environment.get("WORLD_SIZE", "")
    return int(started) if started.isdecimal() and int(started) else nproc


def launch_problems(nproc: int, environment: Mapping[str, str] = os.environ) -> Iterator[Problem]:
    """``--nproc`` beside a launcher that has already started the ranks."""
    local = environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", ""))
    if nproc > 1 and local.isdecimal() and int(local) != nproc:
        rule = f"the launcher has already started {local} ranks on this machine"
        yield Problem("parallel.nproc", nproc, rule, f"Leave it out, or give {local}.")


def world_problems(
    parallel: ParallelConfig, model: ModelConfig, world: int, key: str
) -> Iterator[Problem]:
    """key: the option that gave the number of ranks."""
    unit = parallel.model_parallel_size
    if world % unit:
        rule = f"must be a multiple of TP x PP x CP = {unit}"
        fix = nearest(world, multiples(world, unit)).removesuffix(".")
        degrees = "".join(f", or {text}" for text in _degrees(parallel, model, world))
        yield Problem(key, world, rule, f"{fix}{degrees}.")
        return
    shards = world // parallel.tensor_model_parallel_size // parallel.pipeline_model_parallel_size
    ep = parallel.expert_model_parallel_size
    if shards % ep:
        rule = f"must divide the data x context ranks, {shards}"
        fix = nearest(ep, divisors(gcd(shards, experts(model) or shards)))
        yield Problem("parallel.expert_model_parallel_size", ep, rule, fix)
    elif parallel.num_distributed_optimizer_instances > 1:
        yield from _instances(parallel, shards)


def _degrees(parallel: ParallelConfig, model: ModelConfig, world: int) -> Iterator[str]:
    """One degree changed so that the number of ranks fits."""
    for name, flag in DEGREES.items():
        value = getattr(parallel, name)
        if value == 1:
            continue
        others = parallel.model_parallel_size // value
        legal = set(divisors(world // others)) if world % others == 0 else set()
        if name == "tensor_model_parallel_size":
            legal &= set(tensor_degrees(model))
        if name == "pipeline_model_parallel_size":
            legal = {pp for pp in legal if pp <= stacked_layers(model)}
        if legal:
            yield f"{flag} {min(legal, key=lambda degree: (abs(degree - value), degree))}"


def _instances(parallel: ParallelConfig, shards: int) -> Iterator[Problem]:
    copies = parallel.num_distributed_optimizer_instances
    same_experts = shards // parallel.expert_model_parallel_size
    legal = [d for d in divisors(gcd(shards, same_experts)) if d < shards]
    if copies in legal:
        return
    name = "parallel.num_distributed_optimizer_instances"
    if copies == shards:
        rule = f"leaves each of the {shards} data x context ranks alone, with nothing to shard"
    elif shards % copies:
        rule = f"must divide the data x context ranks, {shards}"
    else:
        rule = f"must divide the ranks with the same experts, {same_experts}"
    yield Problem(name, copies, rule, nearest(copies, legal or [1]))


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that hold one copy of the model, all its experts included."""
    ep, cp = parallel.expert_model_parallel_size, parallel.context_parallel_size
    return max(1, parallel.model_parallel_size * (max(1, ep) // gcd(ep, cp or 1)))


# -- batch --------------------------------------------------------------------------------


def smallest_batch(parallel: ParallelConfig, batch: BatchConfig, world: int) -> int:
    """Samples of a step that keeps every rank busy: one micro-batch for each pipeline stage
    and copy of the model. The default, legal for every schedule."""
    copies = max(1, world // max(1, parallel.model_parallel_size))
    return batch.micro_batch_size * copies * max(1, parallel.pipeline_model_parallel_size)


def schedule_takes(schedule: str, stages: int, micro_batches: int) -> bool:
    """Whether torch's schedule of this name runs so many micro-batches over ``stages`` ranks.

    1F1B fills the pipeline once; the interleaved ones go round by round, all equally long.
    """
    if stages == 1 or schedule == "zbv":
        return micro_batches >= 1
    if schedule == "1f1b":
        return micro_batches >= stages
    return micro_batches >= 1 and micro_batches % max(1, micro_batches // stages) == 0


def batch_problems(
    parallel: ParallelConfig, model: ModelConfig, batch: BatchConfig, world: int
) -> Iterator[Problem]:
    micro, full = batch.micro_batch_size, batch.global_batch_size
    if micro < 1 or full is None or full < 1:
        return
    copies = (
        world // parallel.model_parallel_size if world % parallel.model_parallel_size == 0 else 0
    )
    unit = micro * (copies or 1)
    pp = parallel.pipeline_model_parallel_size
    schedule = parallel.schedule(stacked_layers(model))
    legal = _legal_batches(schedule, pp, unit, full) if copies else multiples(full, unit)
    if full % unit:
        rule = f"must be a multiple of micro_batch_size = {micro}"
        if copies > 1:
            rule = "must be a multiple of micro_batch_size x data-parallel size = "
            rule += f"{micro} x {copies} = {unit}"
        yield Problem("batch.global_batch_size", full, rule, nearest(full, legal))
        return
    if not copies:
        return
    if not schedule_takes(schedule, pp, full // unit):
        yield Problem(
            "batch.global_batch_size",
            full,
            _schedule_rule(schedule, pp, full // unit),
            nearest(full, legal),
        )
    yield from _ramp_problems(batch, schedule, pp, unit)


def _legal_batches(schedule: str, stages: int, unit: int, full: int) -> list[int]:
    """Legal global batches around ``full``. Twice the stages further there is always one."""
    middle = full // unit
    counts = range(max(1, middle - 2 * stages), middle + 2 * stages + 1)
    return [n * unit for n in counts if schedule_takes(schedule, stages, n)]


def _schedule_rule(schedule: str, stages: int, micro_batches: int) -> str:
    given = f"makes {micro_batches} micro-batches; {schedule} over {stages} ranks needs"
    if schedule == "1f1b":
        return f"{given} at least {stages}"
    return f"{given} rounds of equal length, a multiple of {micro_batches // stages}"


def _ramp_problems(batch: BatchConfig, schedule: str, stages: int, unit: int) -> Iterator[Problem]:
    """Every size on the way must be a legal batch too."""
    ramp, full = batch.rampup_batch_size, batch.full
    if ramp is None or min(ramp) < 1 or ramp[0] > full or (full - ramp[0]) % ramp[1]:
        return
    if ramp[0] % unit or ramp[1] % unit:
        if ramp[0] % batch.micro_batch_size or ramp[1] % batch.micro_batch_size:
            return
        start, step = (max(unit, round(value / unit) * unit) for value in ramp[:2])
        rule = "START and INCREMENT must be multiples of micro_batch_size x data-parallel "
        rule += f"size = {unit}"
        yield Problem("batch.rampup_batch_size", ramp, rule, f"Nearest: {(start, step, ramp[2])}.")
        return
    for size in range(ramp[0], full, ramp[1]):
        if not schedule_takes(schedule, stages, size // unit):
            rule = f"its batch of {size} {_schedule_rule(schedule, stages, size // unit)}"
            yield Problem(
                "batch.rampup_batch_size",
                ramp,
                rule,
                f"START {stages * unit} and steps of {stages * unit} are legal.",
            )
            return
