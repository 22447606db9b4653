"""Embedding, output matrix and cross-entropy over a vocabulary shared by ranks.

Each tensor-parallel rank has an equal run of the padded vocabulary; logits are never
gathered. Shape suffixes: B batch, S sequence, E hidden size, L local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.models.gpt import OutputHead
from mtk.models.linear_loss import finish_, linear_losses, row_statistics
from mtk.parallel.collectives import all_reduce
from mtk.parallel.groups import Group


class VocabParallelEmbedding(nn.Module):
    """Looks up the ids of this rank's range; ``leave`` sums over ranks."""

    def __init__(
        self, whole: nn.Embedding, leave: Callable[[Tensor, str], Tensor], group: Group
    ) -> None:
        super().__init__()
        self.weight = whole.weight
        self.leave, self.group = leave, group

    def forward(self, tokens_BS: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = tokens_BS - self.group.rank * rows
        foreign = (local < 0) | (local >= rows)
        found_BSE = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return self.leave(found_BSE.masked_fill(foreign[..., None], 0.0), "tp.embedding")


class VocabParallelHead(OutputHead):
    """Logits [B, S, L] of this rank's range, without the padded columns it may hold."""

    def __init__(
        self, vocab_size: int, enter: Callable[[Tensor, str], Tensor], group: Group
    ) -> None:
        super().__init__(vocab_size)
        self.enter, self.group = enter, group

    def forward(self, x: Tensor, weight_LE: Tensor) -> Tensor:
        logits = self.product(self.enter(x, "tp.head"), weight_LE)
        rows = weight_LE.shape[0]
        used = self._used(rows)
        return logits if used == rows else logits[..., :used]

    def losses(self, x_BSE: Tensor, weight_VE: Tensor, labels_BS: Tensor) -> Tensor:
        rows = weight_VE.shape[0]
        start = self.group.rank * rows
        replace = partial(shared_softmax_minus_target_, start=start, group=self.group)
        entered = self.enter(x_BSE, "tp.head")
        return linear_losses(entered, weight_VE, labels_BS, self._used(rows), self.chunk, replace)

    def _used(self, rows: int) -> int:
        return min(max(self.vocab_size - self.group.rank * rows, 0), rows)


def shared_softmax_minus_target_(
    logits_NL: Tensor, labels_N: Tensor, used: int, start: int, group: Group
) -> Tensor:
    """As :func:`mtk.models.linear_loss.softmax_minus_target_` where each rank has columns from
    ``start`` on; losses are those of the whole vocabulary, the same on every rank."""
    local_N = labels_N - start
    local_N = local_N.masked_fill((local_N < 0) | (local_N >= used), -1)
    highest_N, total_N, target_N = row_statistics(logits_NL, local_N, used)
    whole_N = all_reduce(highest_N, group, "tp.loss.max", "max")
    own_N = (local_N >= 0).float()
    sums_3N = torch.stack((total_N * (highest_N - whole_N).exp(), target_N, own_N))
    total_N, target_N, own_N = all_reduce(sums_3N, group, "tp.loss.sum").unbind()
    target_N = target_N.masked_fill(own_N == 0, float("nan"))  # no rank has the column
    return finish_(logits_NL, labels_N, local_N, whole_N + total_N.log(), target_N, used)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax of the target over the whole vocabulary, by three reductions of [B, S].

    [B, S, L] is read and written as few times as plain torch allows: logits stay in their own
    type until they are shifted, and the division by the sum waits for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BSL: Tensor, labels_BS: Tensor, start: int, group: Group
    ) -> Tensor:
        used = logits_BSL.shape[-1]
        # A rank may hold nothing but padding.
        highest = logits_BSL.amax(-1) if used else logits_BSL.new_full(labels_BS.shape, -1e30)
        highest = all_reduce(highest.float(), group, "tp.loss.max", "max")
        shifted = logits_BSL - highest[..., None]
        local = labels_BS - start
        foreign = (local < 0) | (local >= used)
        local = local.masked_fill(foreign, 0)
        target = highest.new_zeros(labels_BS.shape)
        if used:
            target = shifted.gather(-1, local[..., None])[..., 0].masked_fill(foreign, 0.0)
        target = all_reduce(target, group, "tp.loss.target")
        exponentials = shifted.exp_()
        total = all_reduce(exponentials.sum(-1), group, "tp.loss.sum")
        ctx.save_for_backward(exponentials, total, local, foreign)
        ctx.dtype = logits_BSL.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, total, local, foreign = ctx.saved_tensors
        grad = torch.empty_like(exponentials, dtype=ctx.dtype)
        share_BS = grad_BS / total
        torch.mul(exponentials, share_BS[..., None], out=grad)
        if grad.shape[-1]:
            # Subtracted before it is rounded: of a likely target almost nothing is left.
            own_BS1 = local[..., None]
            target_BS = exponentials.gather(-1, own_BS1)[..., 0] * share_BS
            target_BS = target_BS - grad_BS.masked_fill(foreign, 0.0)
            grad.scatter_(-1, own_BS1, target_BS.to(ctx.dtype)[..., None])
        return grad, None, None, None


def vocab_parallel_losses(
    logits_BSL: Tensor, labels_BS: Tensor, group: Group, padded_vocab_size: int
) -> Tensor:
    """Cross-entropy in nats of every token, fp32 [B, S], the same on every rank."""
    start = group.rank * (padded_vocab_size // group.size)
    losses: Tensor = _CrossEntropy.apply(logits_BSL, labels_BS, start, group)  # type: ignore[no-untyped-call]
    return losses
