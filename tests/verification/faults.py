"""Faults that tests seed on ranks: each is what a launched rank runs instead of the real thing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtk.config.pretrain import PretrainConfig
from mtk.launch.process import Place
from mtk.session import Session
from mtk.training import step
from mtk.verification.layout import LayoutProof, prove_on_rank
from stages.pretrain import train_here


def without_partial_sums(
    place: Place, config: PretrainConfig, steps: int, folder: str
) -> LayoutProof | None:
    """Gradients of norms under sequence parallelism are not summed over tensor ranks."""

    def nothing(*_: Any) -> None:
        return

    step.sum_partial_gradients = nothing
    return prove_on_rank(place, config, steps, folder)


def with_a_flipped_bit(place: Place, config: PretrainConfig, session: Session, *more: Any) -> Any:
    """After its second step, one bit of one moment on rank 1 is another."""
    whole, steps = step.Stepper.step, []

    def flips(self: step.Stepper, *arguments: Any) -> step.StepResult:
        result = whole(self, *arguments)
        steps.append(result)
        if place.rank == 1 and len(steps) == 2:
            _flip(self.optimizer.state_tensors()["exp_avg.final_norm.weight"])
        return result

    step.Stepper.step = flips  # type: ignore[method-assign]
    return train_here(place, config, session, *more)


def _flip(x: Tensor) -> None:
    with torch.no_grad():
        x.view(-1).view(torch.uint8)[5] ^= 4
