"""This process's place among the ranks of a job, and the process group it joins.

The place comes from mtk's own launcher, from torchrun, from Slurm's srun, or there is one
process; whoever started the ranks, the same function then runs in each of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from mtk.errors import LayoutError, WorkerError
from mtk.launch import slurm
from mtk.launch.beacon import Beacon
from mtk.launch.failures import lost_peer
from mtk.launch.stores import connect, meet
from mtk.launch.trace import TraceFile, private_trace
from mtk.parallel.groups import NoTrace, Trace

Starter = Literal["alone", "mtk", "torchrun", "slurm"]
# What mtk's own launcher tells its ranks.
OWN = ("MTK_RANK", "MTK_WORLD_SIZE", "MTK_STORE", "MTK_TRACE")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# How long leaving a process group may take before it is left as it is.
LEAVE = 10.0


@dataclass(frozen=True)
class Place:
    """local_rank, local_world: among the ranks of this machine. started_by: who started the
    ranks. address: host and port where they meet, and the trace file of mtk's launcher."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    started_by: Starter = "alone"
    address: tuple[str, int] = ("", 0)
    trace_file: str = ""


def find_place(device: str = "cpu", environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this process; device: ``cpu`` or ``cuda``.

    Raises LayoutError for an environment that is incomplete or contradicts itself, and when
    this machine has fewer GPUs than ranks.
    """
    if OWN[0] in environment:
        rank, world = _numbers(environment, OWN[:2], "mtk's launcher")
        address = _address(environment.get("MTK_STORE", ""))
        trace = environment.get("MTK_TRACE", "")
        return _placed(device, rank, world, rank, world, "mtk", address, trace)
    if any(name in environment for name in _TORCHRUN):
        return _from_torchrun(device, environment)
    if "SLURM_PROCID" in environment:
        return _from_slurm(device, environment)
    return _placed(device, 0, 1, 0, 1, "alone")


def _from_torchrun(device: str, environment: Mapping[str, str]) -> Place:
    names = (*_TORCHRUN, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else _TORCHRUN
    numbers = _numbers(environment, names, "torchrun")
    rank, world, local_rank = numbers[:3]
    local_world = numbers[3] if len(numbers) > 3 else local_rank + 1
    if world == 1:
        return _placed(device, rank, world, local_rank, local_world, "torchrun")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if absent:
        raise LayoutError(
            f"WORLD_SIZE = {world}, but {' and '.join(absent)} must be set too: without it the "
            f"ranks cannot meet. Start them with torchrun, or set all of it."
        )
    address = _address(f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}")
    return _placed(device, rank, world, local_rank, local_world, "torchrun", address)


def _from_slurm(device: str, environment: Mapping[str, str]) -> Place:
    slurm.require_srun(environment)
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    names = ("SLURM_PROCID", tasks, "SLURM_LOCALID")
    rank, world, local_rank = _numbers(environment, names, "Slurm")
    local_world = slurm.tasks_here(environment, world)
    address = slurm.master(environment) if world > 1 else ("", 0)
    # Slurm may show each task its own GPU only, which then is number 0 for all of them.
    bound = "SLURM_GPUS_PER_TASK" in environment and torch.cuda.device_count() == 1
    return _placed(device, rank, world, local_rank, local_world, "slurm", address, own_device=bound)


def _placed(
    device: str,
    rank: int,
    world: int,
    local_rank: int,
    local_world: int,
    started_by: Starter,
    address: tuple[str, int] = ("", 0),
    trace_file: str = "",
    own_device: bool = False,
) -> Place:
    if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
        raise LayoutError(
            f"the environment ({started_by}) contradicts itself: rank {rank} of {world}, local "
            f"rank {local_rank} of {local_world}. Ranks count from 0; unset the variables or "
            f"start all ranks with one launcher."
        )
    index = 0 if own_device else local_rank
    if device == "cuda":
        require_gpus(1 if own_device else local_world)
    chosen = torch.device("cuda", index) if device == "cuda" else torch.device(device)
    return Place(rank, world, local_rank, local_world, chosen, started_by, address, trace_file)


def require_gpus(ranks: int) -> None:
    """Raises LayoutError unless each of ``ranks`` local ranks can have a GPU of its own."""
    found = torch.cuda.device_count()
    if found < ranks:
        raise LayoutError(
            f"{ranks} ranks on this machine need a GPU each, but torch sees {found}. Start at "
            f"most {found} here (--nproc, --nproc-per-node, --ntasks-per-node), check "
            f"CUDA_VISIBLE_DEVICES, or use --device cpu."
        )


def _numbers(environment: Mapping[str, str], names: tuple[str, ...], who: str) -> list[int]:
    wrong = [
        f"{name} {'is not set' if name not in environment else f'= {environment[name]!r}'}"
        for name in names
        if not environment.get(name, "").isdecimal()
    ]
    if wrong:
        raise LayoutError(
            f"{who} sets {', '.join(names)} to whole numbers, but {'; '.join(wrong)}. Start the "
            f"ranks with one launcher (mtk --nproc, torchrun, srun), or unset what is left over."
        )
    return [int(environment[name]) for name in names]


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LayoutError(f"{text!r} is no address where ranks can meet (host:port).")
    return host, int(port)


@contextmanager
def join(place: Place, timeout: float) -> Iterator[Trace]:
    """Inside the block the default process group exists; the trace is for ``make_ranks``.

    timeout: seconds that a collective waits for a missing rank. One process makes no group.
    Raises WorkerError when the ranks do not meet and, where no launcher of mtk's watches,
    when a collective fails: it then names the missing rank. Never hangs at the end: what has
    not ended after some seconds is left to the end of the process.
    """
    if place.world == 1:
        yield NoTrace()
        return
    prefix = initialise(place, timeout)
    if place.started_by == "mtk":
        yield from _inside(place, own_trace(place))
        return
    trace = private_trace()
    # A connection of its own, whose thread must not wait for the main thread's.
    store = connect(place.address, place.world, 30.0, prefix=f"{prefix}/trace")
    with Beacon(place.rank, place.world, store, trace, timeout) as beacon:
        try:
            yield from _inside(place, trace)
        except Exception as error:
            if not lost_peer(error):
                raise
            raise WorkerError(beacon.report(error)) from error


def own_trace(place: Place) -> Trace:
    """The trace that mtk's launcher watches, for a rank that it started."""
    return TraceFile.open(Path(place.trace_file)).trace(place.rank)


def _inside(place: Place, trace: Trace) -> Iterator[Trace]:
    try:
        yield trace
    except BaseException:
        _leave(place, abort=True)
        raise
    _leave(place, abort=False)


def initialise(place: Place, timeout: float) -> str:
    """Make the default process group: gloo on the CPU; NCCL for CUDA tensors and gloo for
    others on GPUs. Returns the prefix of the job's keys in its store. Raises WorkerError when
    the other ranks do not come within ``timeout`` seconds."""
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    backend, prefix = "gloo", ""
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
        backend, options["device_id"] = "cpu:gloo,cuda:nccl", place.device
    try:
        store = connect(place.address, place.world, timeout, host=_hosts(place))
        if place.started_by != "mtk":
            prefix = meet(store, place.rank, place.world, timeout)
            store = dist.distributed_c10d.PrefixStore(prefix, store)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, **options
        )
    except (RuntimeError, TimeoutError) as error:
        host, port = place.address
        raise WorkerError(
            f"rank {place.rank} could not meet the {place.world - 1} others at {host}:{port}: "
            f"{error}. All ranks must start within {timeout:.0f} s "
            f"(--distributed-timeout-minutes) and reach that address."
        ) from error
    return prefix


def _hosts(place: Place) -> bool:
    """Rank 0 hosts the store where no launcher does."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    launched = place.started_by == "mtk" or (place.started_by == "torchrun" and agent)
    return place.rank == 0 and not launched


def _leave(place: Place, *, abort: bool) -> None:
    """Destroy the process group; after a failure without waiting for what is under way."""

    def destroy() -> None:
        if abort and place.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        elif dist.is_initialized():
            dist.destroy_process_group()

    # Torch waits without limit for collectives under way, whose peers may be gone.
    thread = threading.Thread(target=destroy, name="leave the process group", daemon=True)
    thread.start()
    thread.join(LEAVE / 5 if abort else LEAVE)
