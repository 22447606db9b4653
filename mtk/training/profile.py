"""Where the time of some steps goes: a trace and a table of operators for each rank, and the
kinds of CUDA kernels (``mtk pretrain --profile``; ``mtk bench train`` counts by them too)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from mtk.training.batch import GlobalBatch

# Steps of a run before the profiled ones: compilers and caches are done with by then.
SETTLED = 5
OTHER = "other eager"
# The first that fits counts: the compiler's kernels bear the names of what they fuse, and
# those of attention are built from the same library as products.
KINDS = (
    ("communication", r"nccl"),
    ("copies", r"memcpy|memset"),
    ("attention", r"triton_tem.*attention"),
    ("matrix products", r"triton_tem"),
    ("fused", r"triton"),
    ("attention", r"flash|fmha|sdpa|cudnn"),
    ("optimizer", r"adam|multi_tensor_apply"),
    ("matrix products", r"nvjet|gemm|cutlass|xmma|splitk"),
    # Kernels written in Triton by hand are called as their Python functions; others are C++.
    ("fused", r"^\w+$"),
)
_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in KINDS)
_ROWS = 40


def kernel_kind(name: str) -> str:
    """The kind in ``KINDS`` of a CUDA kernel, or ``OTHER``."""
    lower = name.lower()
    return next((kind for kind, pattern in _COMPILED if pattern.search(lower)), OTHER)


@dataclass(frozen=True)
class Kernel:
    """seconds: of all ``calls`` together, on the device."""

    name: str
    seconds: float
    calls: int

    @property
    def kind(self) -> str:
        return kernel_kind(self.name)


def kernels_of(profiler: Any) -> list[Kernel]:
    """What ran on the CUDA device under ``profiler`` (torch.profiler.profile), costliest first;
    copies are among it. Empty on the CPU."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA:
            continue
        if getattr(event, "is_user_annotation", False):
            continue  # spans over kernels that are counted themselves
        seconds[event.name] += event.device_time * 1e-6
        calls[event.name] += 1
    found = [Kernel(name, spent, calls[name]) for name, spent in seconds.items()]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def by_kind(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Seconds of each kind that occurs, most first."""
    sums: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        sums[kernel.kind] += kernel.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def profiled(
    train: Callable[[int], Iterator[GlobalBatch]],
    steps: int,
    folder: Path,
    rank: int,
    device: torch.device,
) -> Callable[[int], Iterator[GlobalBatch]]:
    """``train`` whose consumer is profiled for ``steps`` steps after the first ``SETTLED``.

    Writes ``rank_0000.json`` (Chrome's trace format) and ``rank_0000.txt`` into ``folder`` when
    the steps, or the batches, are over. With 0 steps it is ``train`` itself.
    """
    if not steps:
        return train

    def batches(consumed: int) -> Iterator[GlobalBatch]:
        source = train(consumed)
        yield from islice(source, SETTLED)
        first = next(source, None)
        if first is None:
            return
        profiler = torch.profiler.profile(activities=_activities(device))
        profiler.start()
        try:
            yield first
            yield from islice(source, steps - 1)
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            profiler.stop()
            _write(profiler, folder, rank, device)
        yield from source

    return batches


def _activities(device: torch.device) -> list[ProfilerActivity]:
    on_device = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *on_device]


def _write(profiler: Any, folder: Path, rank: int, device: torch.device) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"rank_{rank:04d}.json"
    temporary = target.with_suffix(".tmp.json")
    profiler.export_chrome_trace(str(temporary))
    temporary.replace(target)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    kinds = by_kind(kernels_of(profiler)).items()
    lines = [f"{seconds * 1e3:10.1f} ms  {kind}" for kind, seconds in kinds]
    table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS)
    text = "\n".join([*lines, table])
    target.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
