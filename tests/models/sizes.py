"""Small model configurations for tests."""

from __future__ import annotations

from typing import Any

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.models.build import build_model
from mtk.models.gpt import GPT
from mtk.models.init import initialize


def small_config(**changes: Any) -> ModelConfig:
    """A GPT of two layers; ``changes`` override."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 24,
        "vocab_size": 97,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return make(ModelConfig, **(values | changes))


def llama_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "add_bias_linear": False,
        "num_query_groups": 2,
    }
    return small_config(**(values | changes))


def small_model(config: ModelConfig, seed: int = 1, **kernel: Any) -> GPT:
    model = build_model(config, **kernel)
    initialize(model, config, seed)
    return model.eval()
