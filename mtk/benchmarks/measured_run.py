"""Some steps of a real training on this rank, timed one by one; nothing is saved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mtk.config.bench import BenchConfig
from mtk.config.pretrain import PretrainConfig
from mtk.launch.process import Place
from mtk.log import Reporter
from mtk.parallel.ranks import Ranks
from mtk.parallel.rng import stream_seed
from mtk.training.assemble import make_stepper
from mtk.training.batch import GlobalBatch
from mtk.training.data import run_data, with_vocabulary
from mtk.training.join import training_ranks
from mtk.training.opened_data import OpenedData, open_data
from mtk.training.step import Stepper

Config = TypeVar("Config", bound=PretrainConfig)
Found = TypeVar("Found")


@dataclass(frozen=True)
class RankRun:
    """seconds: of each measured step. peak_allocated, peak_reserved: bytes of the CUDA
    allocator during them, None on the CPU. start_seconds: until the first step was done."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    parameters: int
    peak_allocated: int | None
    peak_reserved: int | None
    start_seconds: float


def run_steps(place: Place, config: BenchConfig) -> list[RankRun]:
    """The run of each rank, on all ranks; for ``launch``."""
    with training_ranks(place, config) as ranks:
        return gathered(_measure(config, ranks), ranks)


def gathered(own: Found, ranks: Ranks) -> list[Found]:
    """What each rank found, on all ranks."""
    if not ranks.distributed:
        return [own]
    found: list[Any] = [None] * ranks.world.size
    dist.all_gather_object(found, own)
    return found


def prepare(
    config: Config, ranks: Ranks, steps: int
) -> tuple[Config, Stepper, Iterator[GlobalBatch]]:
    """The stepper with initial weights and the batches of ``steps`` steps."""
    config, data = opened(config, steps)
    stepper = make_stepper(config, config.batch.full * steps, ranks)
    batches = batches_of(config, data, steps, ranks)
    torch.manual_seed(stream_seed(config.runtime.seed, ranks, config.parallel.sequence_parallel))
    return config, stepper, batches


def opened(config: Config, steps: int) -> tuple[Config, OpenedData]:
    """The configuration of a run of ``steps`` steps on its data, whose vocabulary it then knows."""
    length = dataclasses.replace(
        config.length, train_iters=steps, train_samples=None, train_tokens=None
    )
    config = dataclasses.replace(config, length=length)
    data = open_data(config.data)
    return with_vocabulary(config, data), data  # type: ignore[return-value]


def batches_of(
    config: PretrainConfig, data: OpenedData, steps: int, ranks: Ranks
) -> Iterator[GlobalBatch]:
    """What this rank trains on in ``steps`` steps, read ahead as in every training."""
    samples, quiet = config.batch.full * steps, Reporter(quiet=True)
    found = run_data(config, data, samples, quiet, ranks.dp.rank, ranks.dp.size)
    return iter(found.train(0))


def _measure(config: BenchConfig, ranks: Ranks) -> RankRun:
    started = time.perf_counter()
    config, stepper, batches = prepare(config, ranks, config.measure.total)
    seconds, losses, first = [], [], 0.0
    for step in range(config.measure.total):
        if step == config.measure.warmup and ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
        wait(ranks)
        begun = time.perf_counter()
        result = stepper.step(next(batches), config.batch.full * step)
        wait(ranks)
        ended = time.perf_counter()
        first = first or ended - started
        if step >= config.measure.warmup:
            seconds.append(ended - begun)
            losses.append(result.loss.item())
    return RankRun(
        tuple(seconds),
        tuple(losses),
        sum(weight.numel() for weight in stepper.main.weights.values()),
        *peaks(ranks.device),
        first,
    )


def wait(ranks: Ranks) -> None:
    """Until this rank's device has done all it was given."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def peaks(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes that the CUDA allocator handed out and reserved at most; None on the CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
