"""Named starting points: sizes and hyper-parameters as published, or as measured here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mtk.config.decoder_recipes import DECODERS, LLAMA
from mtk.config.recipes_mamba import MAMBA_RECIPES
from mtk.config.resolve import Layer
from mtk.errors import ConfigError, Problem

_GPT3: dict[str, Any] = {
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.01,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "activation": "gelu-tanh",
}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # The demo's model: learns English well below 2.6 bits per byte in about two
    # minutes on two cores.
    "gpt-tiny": {
        **LLAMA,
        "num_layers": 4,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "seq_length": 128,
        "max_position_embeddings": 512,
        "untie_embeddings_and_output_weights": False,
        "micro_batch_size": 16,
        "global_batch_size": 16,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "lr_warmup_fraction": 0.05,
    },
    # Megatron-LM's README: GPT-345M.
    "gpt-345m": {
        **_GPT3,
        "num_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "seq_length": 1024,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "lr": 1.5e-4,
        "min_lr": 1e-5,
        "weight_decay": 0.01,
        "adam_beta2": 0.999,
        "train_iters": 500_000,
    },
    # The smallest row of Megatron-LM's weak-scaling table.
    "gpt-1.7b": {
        **_GPT3,
        "num_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "seq_length": 4096,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "micro_batch_size": 4,
        "global_batch_size": 192,
        "lr": 2e-4,
        "min_lr": 2e-5,
        "precision": "bf16",
    },
    # Brown et al. 2020, table 2.1.
    "gpt-7b": {
        **_GPT3,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "seq_length": 2048,
        "micro_batch_size": 2,
        "global_batch_size": 1024,
        "lr": 1.2e-4,
        "min_lr": 1.2e-5,
        "precision": "bf16",
    },
    "gpt3-175b": {
        **_GPT3,
        "num_layers": 96,
        "hidden_size": 12288,
        "num_attention_heads": 96,
        "seq_length": 2048,
        "micro_batch_size": 1,
        "global_batch_size": 1536,
        "lr": 6e-5,
        "min_lr": 6e-6,
        "init_method_std": 0.006,
        "precision": "bf16",
    },
    **DECODERS,
    # The demo's model with eight experts of its width, two a token.
    "moe-tiny": {
        **LLAMA,
        "num_layers": 4,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "num_experts": 8,
        "seq_length": 128,
        "max_position_embeddings": 512,
        "untie_embeddings_and_output_weights": False,
        "micro_batch_size": 16,
        "global_batch_size": 16,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "lr_warmup_fraction": 0.05,
    },
    # Jiang et al. 2024.
    "mixtral-8x7b": {
        **LLAMA,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 14336,
        "num_experts": 8,
        "rotary_base": 1e6,
        "seq_length": 4096,
        "max_position_embeddings": 32768,
        "micro_batch_size": 1,
        "global_batch_size": 1024,
        "lr": 3e-4,
        "min_lr": 3e-5,
        "precision": "bf16",
    },
    # Yang et al. 2025; rates and batch are not published and have Mixtral's.
    "qwen3-30b-a3b": {
        **LLAMA,
        "num_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "kv_channels": 128,
        "qk_layernorm": True,
        "ffn_hidden_size": 6144,
        "num_experts": 128,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 768,
        "rotary_base": 1e6,
        "norm_epsilon": 1e-6,
        "seq_length": 4096,
        "max_position_embeddings": 32768,
        "micro_batch_size": 1,
        "global_batch_size": 1024,
        "lr": 3e-4,
        "min_lr": 3e-5,
        "precision": "bf16",
    },
    # Megatron-LM's README: BERT-345M and T5-220M.
    "bert-345m": {
        "family": "bert",
        "num_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "seq_length": 512,
        "micro_batch_size": 4,
        "global_batch_size": 32,
        "lr": 1e-4,
        "min_lr": 1e-5,
        "lr_warmup_fraction": 0.01,
        "train_iters": 1_000_000,
    },
    "t5-220m": {
        "family": "t5",
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "kv_channels": 64,
        "ffn_hidden_size": 3072,
        "seq_length": 512,
        "micro_batch_size": 16,
        "global_batch_size": 128,
        "lr": 1e-4,
        "min_lr": 1e-5,
        "lr_warmup_fraction": 0.01,
        "train_iters": 1_000_000,
    },
    **MAMBA_RECIPES,
}


# Of the released weights, for counting where no tokenizer has said otherwise.
VOCABULARIES: Mapping[str, int] = {
    "llama2-7b": 32000,
    "llama3-8b": 128_256,
    "llama3.1-8b": 128_256,
    "llama3.2-1b": 128_256,
    "mistral-7b": 32000,
    "qwen2.5-7b": 152_064,
    "qwen3-8b": 151_936,
    "gemma-7b": 256_000,
    "pythia-6.9b": 50432,
    "bloom-7b1": 250_880,
    "mixtral-8x7b": 32000,
    "qwen3-30b-a3b": 151_936,
    "mamba2-130m": 50277,
    "mamba2-2.7b": 50277,
    "hybrid-8b": 256_000,
}


def recipe_layer(name: Any) -> Layer:
    """The lowest layer of a configuration. Raises ConfigError for an unknown name."""
    if not isinstance(name, str):
        raise ConfigError([Problem("recipe", name, "must be text: one name")])
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        fix = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(RECIPES)}."
        raise ConfigError([Problem("recipe", name, "no such recipe", fix)])
    return Layer(f"recipe {name}", RECIPES[name])
