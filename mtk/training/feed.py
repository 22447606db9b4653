"""From a micro-batch of the data to this rank's tokens on its device."""

from __future__ import annotations

from torch import Tensor

from mtk.kernels.transfer import send
from mtk.parallel.context import cut, local_positions
from mtk.parallel.ranks import Ranks
from mtk.training.batch import LocalBatch, MicroBatch


class Feed:
    """Moves micro-batches to the device and keeps this rank's part of each sequence."""

    def __init__(self, ranks: Ranks) -> None:
        self.device, self.cp = ranks.device, ranks.cp

    def __call__(self, batch: MicroBatch) -> LocalBatch:
        positions = self._part(batch.positions_BS)
        if positions is None and self.cp.size > 1:
            positions = local_positions(batch.tokens_BS.shape[1], self.cp, self.device)
        return LocalBatch(
            tokens_BS=self._own(batch.tokens_BS),
            labels_BS=self._own(batch.labels_BS),
            loss_mask_BS=self._own(batch.loss_mask_BS),
            positions=positions,
            documents_BS=self._part(batch.documents_BS),
            extra={k: self._extra(x, batch.tokens_BS) for k, x in batch.extra.items()},
        )

    def _extra(self, value: Tensor, tokens_BS: Tensor) -> Tensor:
        """What is given for each token is cut as the tokens are."""
        if value.shape[:2] == tokens_BS.shape:
            return self._own(value)
        return send(value, self.device)

    def _own(self, whole_BS: Tensor) -> Tensor:
        return send(cut(whole_BS, self.cp), self.device)

    def _part(self, whole_BS: Tensor | None) -> Tensor | None:
        return None if whole_BS is None else self._own(whole_BS)
