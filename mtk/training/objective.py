"""What training minimises: losses of a model's outputs, each with its weight.

An objective has one or more terms. A term is summed over the global batch and divided by the
sum of its weights there, so that neither micro-batches nor ranks change the result; the loss
of a step is the sum of the terms. Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.errors import LayoutError, Problem
from mtk.training.batch import LocalBatch, MicroBatch

# Losses in nats [B, S] from logits and labels.
TokenLosses = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """names: of the terms. weights: how much each loss of a (micro- or local) batch counts,
    fp32, a tensor for each term. losses: nats, fp32, of the shapes of the weights; outputs:
    what the model returned."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def weights(self, batch: MicroBatch | LocalBatch) -> tuple[Tensor, ...]: ...
    def losses(self, outputs: Any, batch: LocalBatch) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of every token that the loss mask counts; ``outputs`` are logits."""

    token_losses: TokenLosses
    names: tuple[str, ...] = ("loss",)

    def weights(self, batch: MicroBatch | LocalBatch) -> tuple[Tensor, ...]:
        return (batch.loss_mask_BS,)

    def losses(self, outputs: Any, batch: LocalBatch) -> tuple[Tensor, ...]:
        return (self.token_losses(outputs, batch.labels_BS),)


@dataclass(frozen=True)
class MaskedTokens:
    """BERT's losses: of the tokens that were masked, and with a binary head of the order of the
    segments (``extra["order"]``: 0 or 1, -1 does not count). Outputs as ``Bert`` returns them.
    """

    token_losses: TokenLosses
    binary: bool

    @property
    def names(self) -> tuple[str, ...]:
        return ("lm_loss", "sop_loss") if self.binary else ("lm_loss",)

    def weights(self, batch: MicroBatch | LocalBatch) -> tuple[Tensor, ...]:
        if not self.binary:
            return (batch.loss_mask_BS,)
        return batch.loss_mask_BS, (batch.extra["order"] >= 0).float()

    def losses(self, outputs: Any, batch: LocalBatch) -> tuple[Tensor, ...]:
        if not self.binary:
            return (self.token_losses(outputs, batch.labels_BS),)
        logits_BSV, order_B2 = outputs
        order = batch.extra["order"].clamp(min=0)
        swapped = F.cross_entropy(order_B2.float(), order, reduction="none")
        return self.token_losses(logits_BSV, batch.labels_BS), swapped


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of each sample's label (``extra["label"]``, int64 [B]) where
    ``extra["counted"]`` (fp32 [B]) is 1. Outputs are [B x choices, values]: a value for each
    choice, or for each class."""

    choices: int
    names: tuple[str, ...] = ("loss",)

    def logits(self, outputs: Tensor) -> Tensor:
        """fp32 [B, classes]."""
        values = self.choices * outputs.shape[-1]
        return outputs.float().reshape(-1, values)

    def weights(self, batch: MicroBatch | LocalBatch) -> tuple[Tensor, ...]:
        return (batch.extra["counted"],)

    def losses(self, outputs: Any, batch: LocalBatch) -> tuple[Tensor, ...]:
        logits_BK = self.logits(outputs)
        return (F.cross_entropy(logits_BK, batch.extra["label"], reduction="none"),)


@dataclass(frozen=True)
class OfTokens:
    """An objective where ranks share the tokens of a sequence (context parallelism): a loss of a
    whole sample would be counted by each of them. Raises LayoutError for one."""

    inner: Objective

    @property
    def names(self) -> tuple[str, ...]:
        return self.inner.names

    def weights(self, batch: MicroBatch | LocalBatch) -> tuple[Tensor, ...]:
        found = self.inner.weights(batch)
        for name, weight in zip(self.names, found, strict=True):
            if weight.shape[:2] != batch.labels_BS.shape:
                rule = f"shares the tokens of a sample, and {name} is no loss of tokens"
                raise LayoutError([Problem("parallel.context_parallel_size", None, rule)])
        return found

    def losses(self, outputs: Any, batch: LocalBatch) -> tuple[Tensor, ...]:
        return self.inner.losses(outputs, batch)


def counts(objective: Objective, batch: MicroBatch | LocalBatch) -> Tensor:
    """fp32 [terms]: the sum of each term's weights."""
    return torch.stack([weight.sum() for weight in objective.weights(batch)])


def sums(objective: Objective, outputs: Any, batch: LocalBatch) -> Tensor:
    """fp32 [terms]: the weighted sum of each term's losses."""
    pairs = zip(objective.losses(outputs, batch), objective.weights(batch), strict=True)
    return torch.stack([(loss * weight).sum() for loss, weight in pairs])
