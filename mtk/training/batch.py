"""What the loop consumes. Shape suffixes: B micro-batch, S sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.parallel.context import cut, local_positions
from mtk.parallel.groups import Group


class MicroBatch(Protocol):
    """Inputs, targets (int64) and loss mask (fp32), each [B, S]; with packed documents also
    the number of each token's document and its position (int64), else None."""

    @property
    def tokens_BS(self) -> Tensor: ...
    @property
    def labels_BS(self) -> Tensor: ...
    @property
    def loss_mask_BS(self) -> Tensor: ...
    @property
    def documents_BS(self) -> Tensor | None: ...
    @property
    def positions_BS(self) -> Tensor | None: ...


@dataclass(frozen=True)
class GlobalBatch:
    """All micro-batches of one optimizer step; samples: how many sequences they hold."""

    micro_batches: Sequence[MicroBatch]
    samples: int

    @property
    def tokens(self) -> int:
        return sum(micro.tokens_BS.numel() for micro in self.micro_batches)

    def valid_tokens(self) -> Tensor:
        """fp32 scalar: tokens that count in the loss."""
        total = self.micro_batches[0].loss_mask_BS.sum()
        for micro in self.micro_batches[1:]:
            total = total + micro.loss_mask_BS.sum()
        return total.clamp(min=1.0)


@dataclass(frozen=True)
class LocalBatch:
    """This context-parallel rank's part of a micro-batch; fields as of :class:`MicroBatch`.

    positions_BS: always given where there are several ranks, [S / cp] if all rows agree.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    documents_BS: Tensor | None
    positions_BS: Tensor | None


def local_part(micro: MicroBatch, cp: Group) -> MicroBatch:
    """The tokens of ``micro`` that this rank works on (head-tail balanced)."""
    if cp.size == 1:
        return micro
    documents, positions = micro.documents_BS, micro.positions_BS
    if positions is None:
        own = local_positions(micro.tokens_BS.shape[1], cp).to(micro.tokens_BS.device)
    else:
        own = cut(positions, cp)
    return LocalBatch(
        cut(micro.tokens_BS, cp),
        cut(micro.labels_BS, cp),
        cut(micro.loss_mask_BS, cp),
        None if documents is None else cut(documents, cp),
        own,
    )


def forward(model: GPT, micro: MicroBatch, device: torch.device) -> Tensor:
    """Logits [B, S, V] of a micro-batch, its documents kept apart where it names them."""
    positions, documents = (
        None if x is None else x.to(device, non_blocking=True)
        for x in (micro.positions_BS, micro.documents_BS)
    )
    tokens_BS = micro.tokens_BS.to(device, non_blocking=True)
    logits_BSV: Tensor = model(tokens_BS, positions, documents=documents)
    return logits_BSV
