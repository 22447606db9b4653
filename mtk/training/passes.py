"""Forward and backward passes over the micro-batches of a step, or forward for evaluation.

Shape suffixes: B micro-batch, S sequence, V vocabulary (this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.parallel.fsdp import gather_weights, hold_gradients, reduce_held
from mtk.parallel.pipeline import Pipeline
from mtk.training.batch import MicroBatch

# Losses in nats [B, S] from logits and labels.
TokenLosses = Callable[[Tensor, Tensor], Tensor]
# Told the losses, labels and loss mask of a micro-batch.
Score = Callable[[Tensor, Tensor, Tensor], None]


class Passes(Protocol):
    """How this rank runs the model. train: returns this rank's part of the mean loss.

    valid: tokens that count in the global batch; scale: of the loss (fp16). collect is
    called whenever gradients of a micro-batch are there. evaluate: every rank calls it with
    equally many micro-batches; only ranks that have losses score them. refresh: weights have
    changed, what repeats them on this rank must follow.
    """

    def train(
        self,
        batches: Sequence[MicroBatch],
        valid: Tensor,
        scale: float,
        collect: Callable[[], None],
    ) -> Tensor: ...

    def evaluate(self, batches: Sequence[MicroBatch], score: Score) -> None: ...

    def refresh(self) -> None: ...


@dataclass(frozen=True)
class LocalBatch:
    """This rank's tokens of a micro-batch, on its device."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    positions: Tensor | None
    documents_BS: Tensor | None


@dataclass(frozen=True)
class Overlap:
    """What goes on during compute: gathering weights, reducing gradients."""

    gather: bool = True
    reduce: bool = True


class Accumulation:
    """One micro-batch after the other through the whole model.

    local: moves a micro-batch to the device and cuts this rank's tokens out. reduce_each:
    gradients are reduced after every micro-batch and weights freed, so that no rank ever holds
    all of either (full sharding); else both stay whole until the last one.
    """

    def __init__(
        self,
        model: GPT,
        token_losses: TokenLosses,
        local: Callable[[MicroBatch], LocalBatch],
        overlap: Overlap = Overlap(),
        reduce_each: bool = False,
    ) -> None:
        self.model, self.token_losses, self.local = model, token_losses, local
        self.overlap, self.reduce_each = overlap, reduce_each

    def train(
        self,
        batches: Sequence[MicroBatch],
        valid: Tensor,
        scale: float,
        collect: Callable[[], None],
    ) -> Tensor:
        self.model.train()
        if not self.overlap.gather:
            gather_weights(self.model)
        total = torch.zeros((), device=valid.device)
        for index, batch in enumerate(batches):
            due = self.reduce_each or index == len(batches) - 1
            hold_gradients(self.model, reduce=due and self.overlap.reduce)
            local = self.local(batch)
            losses_BS = self.losses(local)
            loss = (losses_BS * local.loss_mask_BS).sum() / valid
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            if due and not self.overlap.reduce:
                reduce_held(self.model)
            # FSDP adds shards up by itself, a unit at a time; to take each micro-batch's away
            # would keep a second whole shard.
            if index == len(batches) - 1 or not self.reduce_each:
                collect()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], score: Score) -> None:
        self.model.eval()
        for batch in batches:
            local = self.local(batch)
            score(self.losses(local), local.labels_BS, local.loss_mask_BS)

    def losses(self, local: LocalBatch) -> Tensor:
        """Nats of every token, fp32 [B, S]."""
        logits_BSV = self.model(local.tokens_BS, local.positions, documents=local.documents_BS)
        return self.token_losses(logits_BSV, local.labels_BS)

    def refresh(self) -> None:
        return


class Pipelined:
    """All micro-batches through this rank's pipeline stages; losses come from the last one."""

    def __init__(
        self,
        pipeline: Pipeline,
        token_losses: TokenLosses,
        local: Callable[[MicroBatch], LocalBatch],
        overlap: Overlap = Overlap(),
    ) -> None:
        self.pipeline, self.token_losses, self.local = pipeline, token_losses, local
        self.overlap = overlap

    def train(
        self,
        batches: Sequence[MicroBatch],
        valid: Tensor,
        scale: float,
        collect: Callable[[], None],
    ) -> Tensor:
        for module in self.pipeline.modules.values():
            module.train()
            if not self.overlap.gather:
                gather_weights(module)
        own = [self.local(batch) for batch in batches]

        def loss(logits_BSV: Tensor, index: int) -> Tensor:
            losses_BS = self.token_losses(logits_BSV, own[index].labels_BS)
            return (losses_BS * own[index].loss_mask_BS).sum() / valid * scale

        return self.pipeline.run(own, loss, collect) / scale

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], score: Score) -> None:
        for module in self.pipeline.modules.values():
            module.eval()
        own = [self.local(batch) for batch in batches]

        def told(logits_BSV: Tensor, index: int) -> Tensor:
            local = own[index]
            losses_BS = self.token_losses(logits_BSV, local.labels_BS)
            score(losses_BS, local.labels_BS, local.loss_mask_BS)
            return losses_BS.new_zeros(())

        self.pipeline.evaluate(own, told)

    def refresh(self) -> None:
        self.pipeline.refresh_copies()
