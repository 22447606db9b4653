"""Forward and backward passes over the micro-batches of a step, or forward for evaluation.

Shape suffixes: B micro-batch, S sequence, V vocabulary (this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.parallel.fsdp import gather_weights, hold_gradients, reduce_held
from mtk.parallel.pipeline import Call, Pipeline, call_gpt
from mtk.training.batch import LocalBatch, MicroBatch
from mtk.training.objective import Objective, sums

# Told the model's outputs for a micro-batch.
Score = Callable[[Any, LocalBatch], None]


class Passes(Protocol):
    """How this rank runs the model. train: returns this rank's part of the terms of the loss.

    objective: what is minimised. counts: fp32 [terms], what each term's sum is divided by;
    scale: of the loss (fp16). collect is called whenever gradients of a micro-batch are there.
    evaluate: every rank calls it with equally many micro-batches; only ranks that have outputs
    score them. refresh: weights have changed, what repeats them on this rank must follow.
    """

    @property
    def objective(self) -> Objective: ...

    def train(
        self,
        batches: Sequence[MicroBatch],
        counts: Tensor,
        scale: float,
        collect: Callable[[], None],
    ) -> Tensor: ...

    def evaluate(self, batches: Sequence[MicroBatch], score: Score) -> None: ...

    def refresh(self) -> None: ...


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
        objective: Objective,
        local: Callable[[MicroBatch], LocalBatch],
        overlap: Overlap = Overlap(),
        reduce_each: bool = False,
        call: Call = call_gpt,
    ) -> None:
        self.model, self.objective, self.local = model, objective, local
        self.overlap, self.reduce_each, self.call = overlap, reduce_each, call

    def train(
        self,
        batches: Sequence[MicroBatch],
        counts: Tensor,
        scale: float,
        collect: Callable[[], None],
    ) -> Tensor:
        self.model.train()
        if not self.overlap.gather:
            gather_weights(self.model)
        total = torch.zeros_like(counts)
        for index, batch in enumerate(batches):
            due = self.reduce_each or index == len(batches) - 1
            hold_gradients(self.model, reduce=due and self.overlap.reduce)
            local = self.local(batch)
            terms = self.terms(local) / counts
            (terms.sum() * scale).backward()  # type: ignore[no-untyped-call]
            if due and not self.overlap.reduce:
                reduce_held(self.model)
            # FSDP adds shards up by itself, a unit at a time; to take each micro-batch's away
            # would keep a second whole shard.
            if index == len(batches) - 1 or not self.reduce_each:
                collect()
            total += terms.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], score: Score) -> None:
        self.model.eval()
        for batch in batches:
            local = self.local(batch)
            score(self.call(self.model, (), local), local)

    def terms(self, local: LocalBatch) -> Tensor:
        """fp32 [terms]: the sums of the objective's terms over a micro-batch."""
        return sums(self.objective, self.call(self.model, (), local), local)

    def refresh(self) -> None:
        return


class Pipelined:
    """All micro-batches through this rank's pipeline stages; losses come from the last one."""

    def __init__(
        self,
        pipeline: Pipeline,
        objective: Objective,
        local: Callable[[MicroBatch], LocalBatch],
        overlap: Overlap = Overlap(),
    ) -> None:
        self.pipeline, self.objective, self.local = pipeline, objective, local
        self.overlap = overlap

    def train(
        self,
        batches: Sequence[MicroBatch],
        counts: Tensor,
        scale: float,
        collect: Callable[[], None],
    ) -> Tensor:
        for module in self.pipeline.modules.values():
            module.train()
            if not self.overlap.gather:
                gather_weights(module)
        own = [self.local(batch) for batch in batches]

        total = torch.zeros_like(counts)

        def loss(outputs: Any, index: int) -> Tensor:
            terms = sums(self.objective, outputs, own[index]) / counts
            total.add_(terms.detach())
            return terms.sum() * scale

        self.pipeline.run(own, loss, collect)
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], score: Score) -> None:
        for module in self.pipeline.modules.values():
            module.eval()
        own = [self.local(batch) for batch in batches]

        def told(outputs: Any, index: int) -> Tensor:
            score(outputs, own[index])
            return own[index].loss_mask_BS.new_zeros(())

        self.pipeline.evaluate(own, told)

    def refresh(self) -> None:
        self.pipeline.refresh_copies()
