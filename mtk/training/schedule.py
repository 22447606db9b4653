"""Learning rate and weight decay as functions of the samples of successful steps.

Formulas and units are Megatron's; golden values in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError, Problem


@dataclass(frozen=True)
class Schedule:
    """All lengths in samples. max_lr, min_lr, init_lr: learning rates."""

    style: str
    max_lr: float
    min_lr: float
    init_lr: float
    warmup: float
    decay: float
    wsd_style: str
    wsd_decay: float
    start_wd: float
    end_wd: float
    wd_style: str
    wd_increase: float

    @classmethod
    def from_config(cls, config: PretrainConfig, train_samples: int) -> Self:
        """Translate steps to samples. Raises ConfigError when the warm-up is too long."""
        schedule, optimizer, batch = config.schedule, config.optimizer, config.batch.full

        def samples(iters: int | None, count: int | None, default: float) -> float:
            if iters is not None:
                return iters * batch
            return default if count is None else count

        decay = samples(schedule.lr_decay_iters, schedule.lr_decay_samples, train_samples)
        warmup = samples(schedule.lr_warmup_iters, schedule.lr_warmup_samples, 0)
        if schedule.lr_warmup_fraction is not None:
            warmup = schedule.lr_warmup_fraction * decay
        if warmup >= decay:
            rule = f"the warm-up of {warmup:g} samples must be shorter than the decay, {decay:g}"
            raise ConfigError([Problem("schedule.lr_warmup_iters", warmup, rule)])
        start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
        return cls(
            style=schedule.lr_decay_style,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            init_lr=schedule.lr_warmup_init,
            warmup=warmup,
            decay=decay,
            wsd_style=schedule.lr_wsd_decay_style,
            wsd_decay=samples(schedule.lr_wsd_decay_iters, schedule.lr_wsd_decay_samples, 0),
            start_wd=optimizer.weight_decay if start is None else start,
            end_wd=optimizer.weight_decay if end is None else end,
            wd_style=optimizer.weight_decay_incr_style,
            wd_increase=train_samples,
        )

    def lr(self, samples: float) -> float:
        """Learning rate of the step that starts after ``samples``."""
        if self.warmup > 0 and samples <= self.warmup:
            return self.init_lr + (self.max_lr - self.init_lr) * samples / self.warmup
        if self.style == "constant":
            return self.max_lr
        if samples > self.decay:
            return self.min_lr
        if self.style == "inverse-square-root":
            lr = self.max_lr * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(samples, 1))
            return max(self.min_lr, lr)
        coefficient = self._coefficient(samples)
        return self.min_lr + coefficient * (self.max_lr - self.min_lr)

    def _coefficient(self, samples: float) -> float:
        if self.style == "WSD":
            stable = self.decay - self.wsd_decay
            if samples <= stable:
                return 1.0
            return _wsd(self.wsd_style, (samples - stable) / self.wsd_decay)
        ratio = (samples - self.warmup) / (self.decay - self.warmup)
        return 1.0 - ratio if self.style == "linear" else (math.cos(math.pi * ratio) + 1.0) / 2.0

    def weight_decay(self, samples: float) -> float:
        """Weight decay of the step that starts after ``samples``."""
        if self.wd_style == "constant" or samples > self.wd_increase:
            return self.end_wd
        ratio = samples / self.wd_increase
        if self.wd_style == "cosine":
            ratio = (math.cos(math.pi * (1.0 - ratio)) + 1.0) / 2.0
        return self.start_wd + ratio * (self.end_wd - self.start_wd)


def _wsd(style: str, ratio: float) -> float:
    """WSD's last part (Hu et al. 2024): from 1 at ratio 0 to 0 at ratio 1."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return (math.cos(math.pi * ratio) + 1.0) / 2.0
    if style == "exponential":
        return 2.0 * math.pow(0.5, ratio) - 1.0
    return 1.0 - math.sqrt(ratio)
