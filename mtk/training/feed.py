"""From a micro-batch of the data to this rank's tokens on its device."""

from __future__ import annotations

from mtk.parallel.ranks import Ranks
from mtk.training.batch import MicroBatch
from mtk.training.passes import LocalBatch


class Feed:
    """Moves micro-batches to the device and keeps this rank's part of each sequence."""

    def __init__(self, ranks: Ranks) -> None:
        self.device = ranks.device
        if ranks.cp.size > 1:
            raise NotImplementedError

    def __call__(self, batch: MicroBatch) -> LocalBatch:
        return LocalBatch(
            tokens_BS=batch.tokens_BS.to(self.device, non_blocking=True),
            labels_BS=batch.labels_BS.to(self.device, non_blocking=True),
            loss_mask_BS=batch.loss_mask_BS.to(self.device, non_blocking=True),
            positions=None,
            documents_BS=None,
        )
