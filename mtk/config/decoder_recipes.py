"""Recipes of published decoders: Llama, Mistral, Qwen, Gemma, Pythia, BLOOM.

Sizes are those of the released weights. Rates and batches are as published; Qwen's and Gemma's
are not, and have Llama 3's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLAMA: Mapping[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "lr_decay_style": "cosine",
}
_TRAINED: Mapping[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1024,
    "lr": 3e-4,
    "min_lr": 3e-5,
    "precision": "bf16",
}
_LLAMA3: Mapping[str, Any] = {
    **LLAMA,
    **_TRAINED,
    "num_query_groups": 8,
    "num_attention_heads": 32,
    "seq_length": 8192,
    "rotary_base": 500_000.0,
    # Four million tokens.
    "global_batch_size": 512,
    "lr_warmup_iters": 8000,
}
_LLAMA3_8B: Mapping[str, Any] = {
    **_LLAMA3,
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
}
_QWEN: Mapping[str, Any] = {
    **LLAMA,
    **_TRAINED,
    "norm_epsilon": 1e-6,
    "rotary_base": 1e6,
    "seq_length": 4096,
    "max_position_embeddings": 32768,
}

DECODERS: Mapping[str, Mapping[str, Any]] = {
    # Touvron et al. 2023.
    "llama2-7b": {
        **LLAMA,
        **_TRAINED,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "ffn_hidden_size": 11008,
        "seq_length": 4096,
        "lr_warmup_iters": 2000,
    },
    # Dubey et al. 2024.
    "llama3-8b": {**_LLAMA3_8B},
    "llama3.1-8b": {
        **_LLAMA3_8B,
        "max_position_embeddings": 131_072,
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": 8.0,
        "rope_original_max_positions": 8192,
    },
    "llama3.2-1b": {
        **_LLAMA3,
        "num_layers": 16,
        "hidden_size": 2048,
        "kv_channels": 64,
        "ffn_hidden_size": 8192,
        "untie_embeddings_and_output_weights": False,
        "max_position_embeddings": 131_072,
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": 32.0,
        "rope_original_max_positions": 8192,
    },
    # Jiang et al. 2023, version 0.1; the later ones have no window and other rotary bases.
    "mistral-7b": {
        **LLAMA,
        **_TRAINED,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 14336,
        "seq_length": 8192,
        "max_position_embeddings": 32768,
        "window_size": 4096,
    },
    # Yang et al. 2024 and 2025.
    "qwen2.5-7b": {
        **_QWEN,
        "num_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_query_groups": 4,
        "ffn_hidden_size": 18944,
        "add_qkv_bias": True,
    },
    "qwen3-8b": {
        **_QWEN,
        "num_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "ffn_hidden_size": 12288,
        "qk_layernorm": True,
    },
    # Gemma Team 2024.
    "gemma-7b": {
        **LLAMA,
        **_TRAINED,
        "num_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 16,
        "kv_channels": 256,
        "ffn_hidden_size": 24576,
        "seq_length": 8192,
        "activation": "geglu-tanh",
        "norm_epsilon": 1e-6,
        "apply_layernorm_1p": True,
        "scale_embeddings": True,
        "untie_embeddings_and_output_weights": False,
    },
    # Biderman et al. 2023.
    "pythia-6.9b": {
        **_TRAINED,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "seq_length": 2048,
        "position_embedding_type": "rope",
        "rotary_percent": 0.25,
        "use_parallel_residual": True,
        "untie_embeddings_and_output_weights": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "lr": 1.2e-4,
        "min_lr": 1.2e-5,
        "lr_warmup_fraction": 0.01,
        "lr_decay_style": "cosine",
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "train_iters": 143_000,
    },
    # Le Scao et al. 2022.
    "bloom-7b1": {
        **_TRAINED,
        "num_layers": 30,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "seq_length": 2048,
        "position_embedding_type": "alibi",
        "embedding_layernorm": True,
        "activation": "gelu-tanh",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "global_batch_size": 512,
        "lr": 1.2e-4,
        "min_lr": 1e-5,
        "lr_decay_style": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
    },
}
