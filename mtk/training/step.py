"""One optimizer step: forward and backward over micro-batches, clip, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtk.kernels.transfer import send
from mtk.parallel.apply import Placed
from mtk.parallel.collectives import all_reduce
from mtk.parallel.grads import squared_norm, sum_partial_gradients, total_norm
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks
from mtk.parallel.watchdog import compare_copies
from mtk.precision.float8_history import History
from mtk.precision.loss_scale import LossScale
from mtk.precision.main_weights import MainWeights
from mtk.training.attention_choice import Chosen
from mtk.training.batch import GlobalBatch
from mtk.training.expert_balance import ExpertBalance
from mtk.training.objective import counts
from mtk.training.optimizer import Optimizer
from mtk.training.passes import Passes
from mtk.training.schedule import Schedule


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats per valid token, or the sum of the objective's terms; norm: gradient
    norm before clipping (both scalars on the device, the same on every rank); applied: False
    when fp16 overflowed and the update was skipped; balance: figures of an MoE
    model's balance by name; losses among them are without their coefficients (and not part of
    loss). terms: those of the loss
    by name, where there are several."""

    loss: Tensor
    norm: Tensor
    applied: bool
    balance: Mapping[str, Tensor]
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Stepper:
    """Passes, main weights and optimizer, moved one step at a time.

    placed: what this rank holds of the model. attention: its kernel, for reports. scales: of
    delayed scaling in FP8.
    """

    def __init__(
        self,
        passes: Passes,
        main: MainWeights,
        optimizer: Optimizer,
        schedule: Schedule,
        loss_scale: LossScale,
        ranks: Ranks,
        placed: Placed,
        sequence_parallel: bool = False,
        attention: Chosen | None = None,
        scales: History | None = None,
    ) -> None:
        self.passes, self.main, self.optimizer = passes, main, optimizer
        self.schedule, self.loss_scale = schedule, loss_scale
        self.ranks, self.placed = ranks, placed
        self.sequence_parallel = sequence_parallel
        self.attention, self.scales = attention, scales
        self.balance = ExpertBalance(placed, ranks)
        self.buffers = placed.kept_buffers()

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """What this rank holds of each weight."""
        return self.placed.pieces

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all parameters of the whole model that are trained."""
        return self.placed.trained

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def step(self, batch: GlobalBatch, scheduled_samples: int) -> StepResult:
        """Train on ``batch``; ``scheduled_samples`` places the step in the schedule."""
        self.ranks.trace.phase("forward and backward")
        self.main.clear_gradients()
        if self.scales is not None and self.scales.fresh:
            self.gradients(batch)  # only to see how large everything is
            self.scales.end_step()
            self.main.clear_gradients()
        scale = self.loss_scale.scale
        parts, norm, balance = self.gradients(batch)
        if self.scales is not None:
            self.scales.end_step()
        # Only a dynamic scale has to know on the host; elsewhere the step stays asynchronous.
        finite = bool(torch.isfinite(norm)) if self.loss_scale.dynamic else True
        self.loss_scale = self.loss_scale.updated(finite)
        self.ranks.trace.phase("optimizer")
        if finite:
            lr = self.schedule.lr(scheduled_samples)
            self.update(norm, scale, lr, self.schedule.weight_decay(scheduled_samples))
        named = dict(zip(self.balance.names, balance, strict=True))
        names = self.passes.objective.names
        terms = dict(zip(names, parts, strict=True)) if len(names) > 1 else {}
        return StepResult(parts.sum(), norm, finite, named, terms)

    def update(self, norm: Tensor, loss_scale: float, lr: float, weight_decay: float) -> None:
        """Move all state by the gradients and figures that :meth:`gradients` left."""
        self.optimizer.step(norm, loss_scale, lr, weight_decay)
        self.passes.refresh()
        self.balance.move_biases()

    def gradients(self, batch: GlobalBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Terms of the mean loss, global gradient norm, and figures as in ``balance.names`` (none
        for a dense model); the gradients themselves, times the loss scale, are then in
        ``main.gradients``."""
        objective = self.passes.objective
        own = torch.stack([counts(objective, micro) for micro in batch.micro_batches]).sum(0)
        valid = all_reduce(send(own, self.device), self.ranks.dp, "step.valid_tokens")
        # Weights of a custom loss may be of any size; without any there is nothing to divide.
        valid = torch.where(valid == 0, torch.ones_like(valid), valid)
        scale = self.loss_scale.scale
        self.balance.begin(samples=batch.samples, tokens=batch.tokens, loss_scale=scale)
        terms = self.passes.train(batch.micro_batches, valid, scale, self.main.collect_gradients)
        sum_partial_gradients(self.main.weights, self.main.gradients, self.pieces)
        terms, norm, balance = self._agree(terms)
        return terms, norm if scale == 1.0 else norm / scale, balance

    def _agree(self, terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Terms, norm of the gradients as they are, and balance of the whole job from what each
        rank has."""
        balance = self.balance.part()
        if not self.ranks.distributed:
            present = (g for g in self.main.gradients.values() if g is not None)
            return terms, total_norm(present, self.device), self.balance.figures(balance)
        norm = squared_norm(self.main.gradients, self.pieces, self.device)
        # Tensor-parallel ranks all have the loss of the same tokens.
        mine = terms.double() * float(self.ranks.tp.first)
        whole = all_reduce(
            torch.cat((norm[None], mine, balance)), self.ranks.world, "step.loss_and_norm"
        )
        own = whole[1 : 1 + len(mine)].float()
        return own, whole[0].sqrt().float(), self.balance.figures(whole[1 + len(mine) :])

    def finite(self) -> bool:
        """Whether all main weights of all ranks are numbers; waits for the device."""
        bad = torch.tensor(0 if self.main.finite() else 1)
        return all_reduce(bad, self.ranks.world, "step.finite", "max").item() == 0

    def check_copies(self) -> None:
        """Compare the main weights, the optimizer's state and kept buffers with every copy of
        them on other ranks. Raises GateError, on all ranks together, naming tensors and ranks."""
        compare_copies(*self.state(), self.ranks.world)

    def state(self) -> tuple[dict[str, Piece], dict[str, Tensor]]:
        """All that a step moves, and what of it is here."""
        tensors, pieces = {**self.main.weights, **self.buffers}, dict(self.pieces)
        for key, tensor in self.optimizer.state_tensors().items():
            tensors[key], pieces[key] = tensor, self.pieces[key.split(".", 1)[1]]
        return pieces, tensors
