"""Optimizer, learning-rate schedule and precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.float8 import Float8Options
from mtk.config.schema import option
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with global-norm clipping."""

    lr: float = option(help="Highest learning rate.")
    min_lr: float = option(0.0, help="Lowest learning rate after decay.")
    weight_decay: float = option(
        0.01, help="Decay of matrices and embeddings; biases and norms have none."
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option(
        "constant", help="How weight decay changes from its start to its end."
    )
    start_weight_decay: float | None = option(None, help="Weight decay at the first step.")
    end_weight_decay: float | None = option(None, help="Weight decay at the last step.")
    adam_beta1: float = option(0.9, help="Decay of the first moment.")
    adam_beta2: float = option(0.999, help="Decay of the second moment.")
    adam_eps: float = option(1e-8, help="Added to the root of the second moment.")
    clip_grad: float = option(1.0, help="Largest global L2 norm of the gradient; 0 is off.")

    def problems(self) -> Iterator[Problem]:
        if not 0 < self.lr < math.inf:
            yield Problem("lr", self.lr, "must be greater than 0 and finite")
        if not 0 <= self.min_lr <= self.lr:
            yield Problem("min_lr", self.min_lr, f"must be in [0, lr = {self.lr}]")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be in [0, 1)")
        for name in ("weight_decay", "adam_eps", "clip_grad"):
            if not 0 <= getattr(self, name) < math.inf:
                yield Problem(name, getattr(self, name), "must be 0 or more and finite")
        given = self.start_weight_decay is not None or self.end_weight_decay is not None
        if self.weight_decay_incr_style == "constant":
            if given:
                rule = "start and end weight decay need --weight-decay-incr-style linear or cosine"
                yield Problem("weight_decay_incr_style", "constant", rule)
        elif self.start_weight_decay is None or self.end_weight_decay is None:
            rule = "needs --start-weight-decay and --end-weight-decay"
            yield Problem("weight_decay_incr_style", self.weight_decay_incr_style, rule)
        elif not 0 <= self.start_weight_decay <= self.end_weight_decay < math.inf:
            rule = f"must be in [0, end_weight_decay = {self.end_weight_decay}]"
            yield Problem("start_weight_decay", self.start_weight_decay, rule)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate as a function of samples seen."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = option(
        "linear", help="Shape of the decay; WSD is warmup, stable, decay."
    )
    lr_decay_iters: int | None = option(None, help="Steps until min-lr (default: all).")
    lr_decay_samples: int | None = option(None, help="Samples until min-lr (default: all).")
    lr_warmup_fraction: float | None = option(None, help="Warm-up as a share of the decay length.")
    lr_warmup_iters: int | None = option(None, help="Steps of warm-up.")
    lr_warmup_samples: int | None = option(None, help="Samples of warm-up.")
    lr_warmup_init: float = option(0.0, help="Learning rate at the start of the warm-up.")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = option(
        "exponential", help="Shape of WSD's last part."
    )
    lr_wsd_decay_iters: int | None = option(None, help="Steps of WSD's last part.")
    lr_wsd_decay_samples: int | None = option(None, help="Samples of WSD's last part.")

    def problems(self) -> Iterator[Problem]:
        warmups = (self.lr_warmup_fraction, self.lr_warmup_iters, self.lr_warmup_samples)
        if sum(value is not None for value in warmups) > 1:
            rule = "give one of --lr-warmup-fraction, --lr-warmup-iters, --lr-warmup-samples"
            yield Problem("lr_warmup_fraction", warmups, rule)
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction < 1:
            yield Problem("lr_warmup_fraction", self.lr_warmup_fraction, "must be in [0, 1)")
        if not 0 <= self.lr_warmup_init < math.inf:
            yield Problem("lr_warmup_init", self.lr_warmup_init, "must not be negative")
        yield from self._lengths()
        if self.lr_decay_style != "WSD":
            yield from self._without_wsd()
        elif self.lr_wsd_decay_iters is None and self.lr_wsd_decay_samples is None:
            rule = "needs --lr-wsd-decay-iters or --lr-wsd-decay-samples"
            yield Problem("lr_decay_style", "WSD", rule)

    def _lengths(self) -> Iterator[Problem]:
        for stem, least in (("lr_decay", 1), ("lr_warmup", 0), ("lr_wsd_decay", 1)):
            for name in (f"{stem}_iters", f"{stem}_samples"):
                value = getattr(self, name)
                if value is not None and value < least:
                    yield Problem(name, value, f"must be at least {least}", f"Nearest: {least}.")

    def _without_wsd(self) -> Iterator[Problem]:
        unset = ScheduleConfig()
        for name in ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"):
            if getattr(self, name) != getattr(unset, name):
                rule = "only means something with lr_decay_style = WSD"
                yield Problem(name, getattr(self, name), rule, "Leave it out.")

    def problems_with(self, counts_iterations: bool) -> Iterator[Problem]:
        """Rules that depend on how the length of the training is given."""
        wrong, unit = ("samples", "iters") if counts_iterations else ("iters", "samples")
        for stem in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
            name = f"{stem}_{wrong}"
            if getattr(self, name) is not None:
                rule = f"the training length is {'' if counts_iterations else 'not '}given in steps"
                fix = f"Use --{stem.replace('_', '-')}-{unit}."
                yield Problem(f"schedule.{name}", getattr(self, name), rule, fix)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Float8Options):
    """Number format of parameters and activations; main weights are always fp32."""

    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", help="Compute format.", shortcuts=(("--bf16", "bf16"), ("--fp16", "fp16"))
    )
    loss_scale: float | None = option(None, help="Fixed loss scale (fp16 default: dynamic).")
    initial_loss_scale: float = option(2.0**32, help="Start of the dynamic loss scale.")
    min_loss_scale: float = option(1.0, help="Lower end of the dynamic loss scale.")
    loss_scale_window: int = option(1000, help="Good steps until the scale doubles.")
    hysteresis: int = option(2, help="Bad steps that are tolerated before the scale halves.")

    def problems(self) -> Iterator[Problem]:
        for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield Problem(name, value, "must be greater than 0 and finite")
        yield from self.float8_problems(self.precision)
        if self.min_loss_scale > self.initial_loss_scale:
            rule = f"must not exceed initial_loss_scale = {self.initial_loss_scale:g}"
            yield Problem("min_loss_scale", self.min_loss_scale, rule)
        for name in ("loss_scale_window", "hysteresis"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
        if self.precision != "fp16" or self.loss_scale is not None:
            yield from self._without_dynamic_scale()

    def _without_dynamic_scale(self) -> Iterator[Problem]:
        unset = PrecisionConfig()
        for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
            if getattr(self, name) != getattr(unset, name):
                rule = "only means something with fp16 and without --loss-scale"
                yield Problem(name, getattr(self, name), rule, "Leave it out.")
