"""Formulas of BERT's and T5's parameters against the modules."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.models.build import build_on_meta
from mtk.models.count_families import parameters
from tests.models.sizes import small_config

RELATIVE = {"position_embedding_type": "relative", "relative_attention_num_buckets": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "bert"},
        {"family": "bert", "norm_placement": "post", "num_tokentypes": 3},
        {"family": "bert", "bert_binary_head": False},
        {"family": "t5", "decoder_seq_length": 7},
        {"family": "t5", "decoder_seq_length": 7, "untie_embeddings_and_output_weights": True},
        {
            "family": "t5",
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "activation": "geglu-tanh",
            "kv_channels": 12,
            **RELATIVE,
        },
    ],
    ids=str,
)
def test_parameters(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    assert parameters(config) == sum(p.numel() for p in build_on_meta(config).parameters())
