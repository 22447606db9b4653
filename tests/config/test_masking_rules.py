"""Options of masked data: refused together, for the families that have no use for them."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError

RUN: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "mock_data": True,
    "vocab_size": 50,
    "train_iters": 1,
    "save": "unused",
    "lr": 1e-3,
}

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "masking of a GPT": (
        {"family": "gpt", "mask_prob": 0.2, "short_seq_prob": 0.0},
        ["data.mask_prob = 0.2: has no meaning for family = gpt", "data.short_seq_prob"],
    ),
    "windows of BERT": (
        {"family": "bert", "eod_mask_loss": True, "reset_attention_mask": True},
        ["data.eod_mask_loss = True: has no meaning for family = bert", "reset_attention_mask"],
    ),
    "probabilities": (
        {"family": "bert", "mask_prob": 1.0, "short_seq_prob": -0.1},
        ["mask_prob = 1.0: must lie between 0 and 1", "short_seq_prob = -0.1: must lie in 0..1"],
    ),
    "not a number": ({"family": "bert", "mask_prob": float("nan")}, ["must lie between 0 and 1"]),
    "no room for text": (
        {"family": "bert", "seq_length": 4},
        ["model.seq_length = 4: must be at least 5", "Nearest: 5."],
    ),
    "no room in the decoder": (
        {"family": "t5", "seq_length": 2048},
        ["model.decoder_seq_length = 128: must be at least 460 for seq_length = 2048"],
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused(case: tuple[dict[str, Any], list[str]]) -> None:
    changes, wanted = case
    with pytest.raises(ConfigError) as caught:
        make(PretrainConfig, **{"seq_length": 64, **RUN, **changes})
    for text in wanted:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "bert", "mask_prob": 0.2, "short_seq_prob": 0.0, "seq_length": 5},
        {"family": "bert", "seq_length": 512},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    make(PretrainConfig, **{**RUN, **changes})
