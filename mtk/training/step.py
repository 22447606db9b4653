"""One optimizer step: forward and backward over micro-batches, clip, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.precision.loss_scale import LossScale
from mtk.precision.main_weights import MainWeights
from mtk.training.batch import GlobalBatch, forward
from mtk.training.loss import summed_loss
from mtk.training.optimizer import Optimizer
from mtk.training.schedule import Schedule


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats per valid token; norm: gradient norm before clipping (both scalars
    on the device); applied: False when fp16 overflowed and the update was skipped."""

    loss: Tensor
    norm: Tensor
    applied: bool


class Stepper:
    """Model, main weights and optimizer, moved one step at a time."""

    def __init__(
        self,
        model: GPT,
        main: MainWeights,
        optimizer: Optimizer,
        schedule: Schedule,
        loss_scale: LossScale,
        device: torch.device,
    ) -> None:
        self.model, self.main, self.optimizer = model, main, optimizer
        self.schedule, self.loss_scale, self.device = schedule, loss_scale, device

    def step(self, batch: GlobalBatch, scheduled_samples: int) -> StepResult:
        """Train on ``batch``; ``scheduled_samples`` places the step in the schedule."""
        self.model.train()
        self.optimizer.zero_grad()
        loss = self._forward_backward(batch)
        norm = self.optimizer.unscale_and_norm(self.loss_scale.scale)
        # Only a dynamic scale has to know on the host; elsewhere the step stays asynchronous.
        finite = bool(torch.isfinite(norm)) if self.loss_scale.dynamic else True
        self.loss_scale = self.loss_scale.updated(finite)
        if finite:
            self.optimizer.clip_(norm)
            self.optimizer.step(
                self.schedule.lr(scheduled_samples), self.schedule.weight_decay(scheduled_samples)
            )
            self.main.publish()
        return StepResult(loss, norm, finite)

    def _forward_backward(self, batch: GlobalBatch) -> Tensor:
        valid = batch.valid_tokens().to(self.device)
        total = torch.zeros((), device=self.device)
        for micro in batch.micro_batches:
            logits_BSV = forward(self.model, micro, self.device)
            loss = summed_loss(
                logits_BSV,
                micro.labels_BS.to(self.device, non_blocking=True),
                micro.loss_mask_BS.to(self.device, non_blocking=True),
            )
            loss = loss / valid
            (loss * self.loss_scale.scale).backward()  # type: ignore[no-untyped-call]
            self.main.collect_gradients()
            total += loss.detach()
        return total
