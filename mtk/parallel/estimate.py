"""Steps, FLOPs, time and cost of a planned run, by formula: nothing here is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtk.config.plan import GPUS, PlanConfig
from mtk.config.pretrain import BatchConfig
from mtk.models.count import Flops
from mtk.models.count_families import flops_per_token


@dataclass(frozen=True)
class Estimate:
    """samples and tokens: of the whole run (of one step where no length is given).

    days: at the stated MFU, counting FLOPs as Megatron does. cost: None without a price.
    """

    flops_per_token: Flops
    steps: int
    samples: int
    tokens: int
    flops: float
    step_seconds: float
    days: float
    cost: float | None


def estimate(config: PlanConfig) -> Estimate:
    """What the run takes."""
    batch, seq = config.global_batch_size, config.model.seq_length
    steps, samples = length(config)
    per_token = flops_per_token(config.model)
    rate = config.gpus * GPUS[config.hardware.gpu].peak * config.hardware.mfu
    flops = per_token.full * samples * seq
    days = flops / rate / 86400
    price = config.hardware.price_per_gpu_hour
    return Estimate(
        flops_per_token=per_token,
        steps=steps,
        samples=samples,
        tokens=samples * seq,
        flops=flops,
        step_seconds=per_token.full * batch * seq / rate,
        days=days,
        cost=None if price is None else price * config.gpus * days * 24,
    )


def length(config: PlanConfig) -> tuple[int, int]:
    """(steps, samples) of the run; one step where no length is given."""
    batch = config.global_batch_size
    if config.length.train_iters:
        return config.length.train_iters, config.length.train_iters * batch
    samples = config.length.train_samples or 0
    if config.length.train_tokens:
        samples = math.ceil(config.length.train_tokens / config.model.seq_length)
    if not samples:
        return 1, batch
    return steps_for(samples, config.batch, batch), samples


def steps_for(samples: int, config: BatchConfig, full: int) -> int:
    """Optimizer steps that take ``samples``, with the batch growing as configured."""
    steps, taken = 0, 0
    if config.rampup_batch_size is not None:
        start, increment, over = config.rampup_batch_size
        growths = max(1, (full - start) // increment)
        for index in range((full - start) // increment):
            size = start + index * increment
            until = min(samples, over * (index + 1) // growths)
            more = max(0, math.ceil((until - taken) / size))
            steps, taken = steps + more, taken + more * size
    return steps + max(0, math.ceil((samples - taken) / full))
