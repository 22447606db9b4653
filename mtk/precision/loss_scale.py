"""Dynamic loss scale for fp16 (Micikevicius et al. 2018), with Megatron's hysteresis."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from mtk.config.optimization import PrecisionConfig


@dataclass(frozen=True)
class LossScale:
    """The scale after some number of steps; :meth:`updated` gives the next one.

    A bad step (inf or nan in any gradient) lowers ``patience``; at zero the scale halves,
    and halves again with each further bad step. Only growth restores the patience.
    """

    scale: float
    dynamic: bool
    minimum: float
    window: int
    hysteresis: int
    good_steps: int
    patience: int

    @classmethod
    def start(cls, config: PrecisionConfig) -> Self:
        """Constant 1 for fp32 and bf16, unless a fixed scale is asked for."""
        dynamic = config.loss_scale is None and config.precision == "fp16"
        scale = config.initial_loss_scale if dynamic else (config.loss_scale or 1.0)
        return cls(
            scale=scale,
            dynamic=dynamic,
            minimum=config.min_loss_scale,
            window=config.loss_scale_window,
            hysteresis=config.hysteresis,
            good_steps=0,
            patience=config.hysteresis,
        )

    def updated(self, finite: bool) -> LossScale:
        """After a step whose gradients were all finite, or not."""
        if not self.dynamic:
            return self
        if not finite:
            patience = self.patience - 1
            scale = max(self.scale * 0.5, self.minimum) if patience <= 0 else self.scale
            return dataclasses.replace(self, scale=scale, patience=patience, good_steps=0)
        if self.good_steps + 1 < self.window:
            return dataclasses.replace(self, good_steps=self.good_steps + 1)
        return dataclasses.replace(
            self, scale=self.scale * 2.0, good_steps=0, patience=self.hysteresis
        )

    def to_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps, "patience": self.patience}

    def restored(self, data: dict[str, Any]) -> LossScale:
        """This scale's settings with the counters of a checkpoint."""
        return dataclasses.replace(self, **data) if self.dynamic else self
