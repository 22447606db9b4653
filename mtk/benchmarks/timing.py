"""The same stopwatch for every training: steps back to back, then a few in parts, then a few
under the profiler.

Nothing waits for the device between steps, as nothing does in a training; on CUDA an event at
the end of each step tells when the device was there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from mtk.benchmarks.measured_run import peaks
from mtk.config.bench import TrainBenchConfig
from mtk.training.profile import Kernel, by_kind, kernels_of

# Told what begins now.
Mark = Callable[[str], None]
TOP_KERNELS = 30


def no_mark(name: str) -> None:
    """Nobody wants to know."""
    del name


@dataclass(frozen=True)
class Subject:
    """A training to be measured. step: takes one of the batches, returns the loss (on the device).
    marked(mark): while the block runs, steps tell ``mark`` what part of them begins.
    build_seconds: what it took to make it."""

    step: Callable[[Any], Tensor]
    marked: Callable[[Mark], AbstractContextManager[None]]
    batches: Iterator[Any]
    device: torch.device
    parameters: int
    build_seconds: float


@dataclass(frozen=True)
class Kernels:
    """What ran on the GPU in a step: milliseconds by kind, kernels started, and the costliest
    by name with their kind, milliseconds and calls."""

    milliseconds: dict[str, float]
    count: float
    top: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class TrainRun:
    """One rank's measurement. seconds: of each measured step. cpu_seconds: that all threads of
    the process computed between the ends of steps on the host; what other processes do to a
    shared machine is hardly in them. waits: host seconds of the steps in which the next batch
    was waited for. first_step_seconds: until the device was done with it
    (compilation is in it). split: seconds by part of one typical step, the parts in their
    order. peak_*: bytes of the CUDA allocator in the measured steps, None on the CPU."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    waits: tuple[float, ...]
    loss: float
    parameters: int
    build_seconds: float
    first_step_seconds: float
    peak_allocated: int | None
    peak_reserved: int | None
    split: dict[str, float]
    kernels: Kernels | None

    @property
    def stall(self) -> float:
        """Share of the steps' time in which the host waited for data."""
        return min(1.0, sum(self.waits) / sum(self.seconds))


def steps_needed(config: TrainBenchConfig, device: torch.device) -> int:
    """Batches that :func:`measure` takes."""
    profiled = config.profile_steps if device.type == "cuda" else 0
    return config.measure.total + config.split_steps + profiled


def measure(subject: Subject, config: TrainBenchConfig) -> TrainRun:
    """Measure on this rank; other ranks of the job do the same at the same time."""
    device, warmup = subject.device, config.measure.warmup
    clock, waits, first = Clock(device), [], 0.0
    loss = torch.tensor(math.nan)
    points, computed = [], []
    for index in range(config.measure.total):
        if index == warmup:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            points.append(clock.now())
            computed.append(time.process_time())
        begun = time.perf_counter()
        batch = next(subject.batches)
        waited = time.perf_counter() - begun
        loss = subject.step(batch)
        if index == 0 and warmup:
            clock.wait()
            first = time.perf_counter() - begun
        if index >= warmup:
            points.append(clock.now())
            computed.append(time.process_time())
            waits.append(waited)
    clock.wait()
    seconds = clock.gaps(points)
    memory = peaks(device)
    return TrainRun(
        tuple(seconds),
        tuple(later - earlier for earlier, later in pairwise(computed)),
        tuple(waits),
        loss.item(),
        subject.parameters,
        subject.build_seconds,
        first or seconds[0],
        *memory,
        _split(subject, clock, config.split_steps),
        _kernels(subject, config.profile_steps),
    )


class Clock:
    """Points in time of a device: events on its stream, or the host's clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """A point, for :meth:`gaps`."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def gaps(self, points: Sequence[Any]) -> list[float]:
        """Seconds from each point to the next; on CUDA all of them must be reached."""
        pairs = pairwise(points)
        if self._device.type != "cuda":
            return [later - earlier for earlier, later in pairs]
        return [earlier.elapsed_time(later) * 1e-3 for earlier, later in pairs]


def _split(subject: Subject, clock: Clock, count: int) -> dict[str, float]:
    """Seconds by part of the step of median length, so that they add up to a real one."""
    begun: list[list[tuple[str, Any]]] = []

    def mark(name: str) -> None:
        begun[-1].append((name, clock.now()))

    with subject.marked(mark):
        for _ in range(count):
            begun.append([])
            mark("data")
            batch = next(subject.batches)
            mark("other")
            subject.step(batch)
            mark("")
    clock.wait()
    steps = sorted((parts_of(step, clock) for step in begun), key=lambda parts: sum(parts.values()))
    return steps[len(steps) // 2]


def parts_of(marks: Sequence[tuple[str, Any]], clock: Clock) -> dict[str, float]:
    """Seconds from marks to the next ones, added up by name; the last mark only ends."""
    parts: dict[str, float] = {}
    gaps = clock.gaps([point for _, point in marks])
    for (name, _), seconds in zip(marks[:-1], gaps, strict=True):
        parts[name] = parts.get(name, 0.0) + seconds
    return parts


def _kernels(subject: Subject, steps: int) -> Kernels | None:
    """None on the CPU, or without steps."""
    if subject.device.type != "cuda" or not steps:
        return None
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            subject.step(next(subject.batches))
        torch.cuda.synchronize(subject.device)
    return kernels_per_step(kernels_of(profiler), steps)


def kernels_per_step(found: Sequence[Kernel], steps: int) -> Kernels:
    """Of kernels that ran in ``steps`` steps together, costliest first."""
    kinds = {kind: 1e3 * spent / steps for kind, spent in by_kind(found).items()}
    top = [
        {
            "name": kernel.name,
            "kind": kernel.kind,
            "milliseconds": 1e3 * kernel.seconds / steps,
            "calls": kernel.calls / steps,
        }
        for kernel in found[:TOP_KERNELS]
    ]
    return Kernels(kinds, sum(kernel.calls for kernel in found) / steps, top)
