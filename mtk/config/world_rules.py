"""Rules that tie a layout to the number of ranks and to the batch, and where both come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from mtk.config.layout_rules import stacked_layers, tensor_degrees
from mtk.config.nearest import divisors, multiples, nearest
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


@dataclass(frozen=True)
class Launched:
    """Ranks that somebody has started: how many, here and in all, and the variable that says so."""

    world: int
    local: int
    variable: str


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """What mtk's own launcher, torchrun or Slurm's srun has started; None: nobody has.

    A Slurm step of one task may start its ranks by ``--nproc``, as an interactive shell does.
    """
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    for variable in (
        "MTK_WORLD_SIZE",
        "WORLD_SIZE",
        *([tasks] if "SLURM_PROCID" in environment else ()),
    ):
        world = _number(environment, variable)
        if world and (world > 1 or variable != tasks):
            local = _number(environment, "LOCAL_WORLD_SIZE") if variable == "WORLD_SIZE" else 0
            return Launched(world, local or world, variable)
    return None


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process reports for all: it is alone, or the first of the ranks."""
    found = launched(environment)
    if found is None:
        return True
    ranks = {"MTK_WORLD_SIZE": "MTK_RANK", "WORLD_SIZE": "RANK"}
    return _number(environment, ranks.get(found.variable, "SLURM_PROCID")) == 0


def _number(environment: Mapping[str, str], name: str) -> int:
    found = environment.get(name, "")
    return int(found) if found.isdecimal() else 0


def world_size(nproc: int, environment: Mapping[str, str] = os.environ) -> int:
    """Ranks of the run: those that are started already, else ``nproc``."""
    found = launched(environment)
    return nproc if found is None else found.world


def launch_problems(nproc: int, environment: Mapping[str, str] = os.environ) -> Iterator[Problem]:
    """``--nproc`` beside a launcher that has already started the ranks."""
    found = launched(environment)
    if found is not None and nproc > 1 and found.local != nproc:
        rule = f"{found.local} ranks are already started here ({found.variable} is set)"
        yield Problem("parallel.nproc", nproc, rule, f"Leave it out, or give {found.local}.")


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
        fix = nearest(ep, divisors(gcd(shards, model.num_experts or shards)))
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
    """Samples of a step with one micro-batch for each copy of the model; the default."""
    return batch.micro_batch_size * max(1, world // max(1, parallel.model_parallel_size))


def batch_problems(parallel: ParallelConfig, batch: BatchConfig, world: int) -> Iterator[Problem]:
    """Batches that copies of the model cannot share; any number of micro-batches is legal."""
    micro, full, ramp = batch.micro_batch_size, batch.global_batch_size, batch.rampup_batch_size
    if micro < 1:
        return
    copies, rest = divmod(world, parallel.model_parallel_size)
    unit = micro if rest else micro * copies
    each = f"micro_batch_size = {micro}"
    if unit != micro:
        each = f"micro_batch_size x data-parallel size = {micro} x {copies} = {unit}"
    if full is not None and full >= 1 and full % unit:
        fix = nearest(full, multiples(full, unit))
        yield Problem("batch.global_batch_size", full, f"must be a multiple of {each}", fix)
    # BatchConfig asks that a ramp-up's numbers are positive and multiples of the micro-batch.
    if ramp is None or min(ramp) < 1 or ramp[0] % micro or ramp[1] % micro:
        return
    if ramp[0] % unit or ramp[1] % unit:
        start, step = (max(unit, round(value / unit) * unit) for value in ramp[:2])
        rule = f"START and INCREMENT must be multiples of {each}"
        yield Problem("batch.rampup_batch_size", ramp, rule, f"Nearest: {(start, step, ramp[2])}.")
