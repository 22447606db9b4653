"""Recipes of Mamba-2 and of hybrids with attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BASE: dict[str, Any] = {
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "lr_decay_style": "cosine",
}
# Dao & Gu 2024: half a million tokens a batch, five times GPT-3's learning rate for the size.
_PILE: dict[str, Any] = {
    **_BASE,
    "mamba_num_groups": 1,
    "make_vocab_size_divisible_by": 16,
    "seq_length": 2048,
    "global_batch_size": 256,
    "min_lr": 1e-5,
    "lr_warmup_fraction": 0.01,
    "precision": "bf16",
}
_TINY: dict[str, Any] = {
    **_BASE,
    "hidden_size": 192,
    "mamba_head_dim": 32,
    "mamba_state_dim": 32,
    "mamba_num_groups": 2,
    "mamba_chunk_size": 32,
    "seq_length": 128,
    "micro_batch_size": 16,
    "global_batch_size": 16,
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_warmup_fraction": 0.05,
}

MAMBA_RECIPES: Mapping[str, Mapping[str, Any]] = {
    # As wide as gpt-tiny; about as many parameters.
    "mamba-tiny": {**_TINY, "hybrid_layer_pattern": "MMMMMM"},
    "hybrid-tiny": {
        **_TINY,
        "hybrid_layer_pattern": "M-M*M-",
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "activation": "swiglu",
    },
    "mamba2-130m": {
        **_PILE,
        "hybrid_layer_pattern": "M" * 24,
        "hidden_size": 768,
        "micro_batch_size": 8,
        "lr": 3e-3,
    },
    "mamba2-2.7b": {
        **_PILE,
        "hybrid_layer_pattern": "M" * 64,
        "hidden_size": 2560,
        "micro_batch_size": 2,
        "lr": 8e-4,
    },
    # Waleffe et al. 2024: Mamba-2-Hybrid, as trained on 1.1T tokens.
    "hybrid-8b": {
        **_BASE,
        "hybrid_layer_pattern": "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 16384,
        "untie_embeddings_and_output_weights": True,
        "seq_length": 4096,
        "micro_batch_size": 1,
        "global_batch_size": 256,
        "lr": 1e-4,
        "min_lr": 1e-5,
        "precision": "bf16",
    },
}
