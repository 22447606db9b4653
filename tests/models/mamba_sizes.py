"""Small Mamba and hybrid configurations for tests."""

from __future__ import annotations

from typing import Any

from mtk.config import make
from mtk.config.model import ModelConfig


def mamba_config(**changes: Any) -> ModelConfig:
    """Two layers, sizes that are all different; chunks shorter than the sequence."""
    values: dict[str, Any] = {
        "hybrid_layer_pattern": "MM",
        "hidden_size": 36,
        "mamba_num_heads": 12,
        "mamba_head_dim": 6,
        "mamba_num_groups": 3,
        "mamba_state_dim": 10,
        "mamba_chunk_size": 7,
        "mamba_a_range": (0.1, 2.0),
        "seq_length": 24,
        "vocab_size": 97,
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return make(ModelConfig, **(values | changes))


def hybrid_config(**changes: Any) -> ModelConfig:
    values = {"hybrid_layer_pattern": "M-*M", "num_attention_heads": 4, "num_query_groups": 2}
    return mamba_config(**(values | changes))
