"""Pretraining with a loss of one's own: tokens that matter more count more.

    python examples/keyword_loss.py my-data_text_document checkpoints/keywords

Keywords of a programming language weigh five times as much as other tokens. The weights are part
of the mean's denominator, so that the loss stays a mean over the global batch in every layout.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.training.batch import LocalBatch, MicroBatch
from mtk.training.custom import Custom
from mtk.training.objective import TokenLosses
from stages import pretrain

KEYWORDS = (17, 42, 99)  # ids of the tokens that matter
WEIGHT = 5.0


@dataclass(frozen=True)
class KeywordLoss:
    """Cross-entropy in which labels that are keywords count ``WEIGHT`` times."""

    token_losses: TokenLosses
    names: tuple[str, ...] = ("loss",)

    def weights(self, batch: MicroBatch | LocalBatch) -> tuple[Tensor, ...]:
        keywords = torch.tensor(KEYWORDS, device=batch.labels_BS.device)
        heavier = torch.isin(batch.labels_BS, keywords) * (WEIGHT - 1) + 1
        return (batch.loss_mask_BS * heavier,)

    def losses(self, outputs: Any, batch: LocalBatch) -> tuple[Tensor, ...]:
        return (self.token_losses(outputs, batch.labels_BS),)


def main(data: str, save: str) -> None:
    config = make(
        PretrainConfig,
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        seq_length=64,
        data_path=[data],
        global_batch_size=8,
        train_iters=100,
        lr=1e-3,
        save=save,
    )
    pretrain.run(config, custom=Custom(objective=KeywordLoss))


if __name__ == "__main__":
    main(*sys.argv[1:])
