"""What the loop consumes. Shape suffixes: B micro-batch, S sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    """This rank's micro-batches of one optimizer step.

    samples: sequences of the step, those of all data-parallel ranks together.
    """

    micro_batches: Sequence[MicroBatch]
    samples: int

    @property
    def tokens(self) -> int:
        """Tokens of the step on all ranks."""
        return self.samples * self.micro_batches[0].tokens_BS.shape[1]

    def valid_tokens(self) -> Tensor:
        """fp32 scalar: this rank's tokens that count in the loss."""
        total = self.micro_batches[0].loss_mask_BS.sum()
        for micro in self.micro_batches[1:]:
            total = total + micro.loss_mask_BS.sum()
        return total
