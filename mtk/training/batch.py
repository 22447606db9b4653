"""What the loop consumes. Shape suffixes: B micro-batch, S sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class MicroBatch(Protocol):
    """Inputs, targets (int64) and loss mask (fp32), each [B, S]; with packed documents also
    the number of each token's document and its position (int64), else None. extra: what a
    model family or task needs besides, by name, its first dimension B. What begins with [B, S]
    belongs to tokens, and context parallelism cuts it as it cuts them."""

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
    @property
    def extra(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class LocalBatch:
    """This rank's tokens of a micro-batch, on its device."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    positions: Tensor | None
    documents_BS: Tensor | None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro-batches of one optimizer step.

    samples: of the step, those of all data-parallel ranks together. sequences: of each.
    """

    micro_batches: Sequence[MicroBatch]
    samples: int
    sequences: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the step on all ranks."""
        return self.samples * self.sequences * self.micro_batches[0].tokens_BS.shape[1]
