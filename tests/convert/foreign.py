"""Randomly initialised models of odd shapes, built by transformers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

VOCAB = 301
_GATED: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NEOX: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 160,
}
LLAMA3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
DEEPSEEK: Mapping[str, Any] = {
    **YARN,
    "beta_fast": 16,
    "beta_slow": 2,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
    "truncate": False,
}
# family and what differs from its odd default, by name.
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2": ("llama", {"rope_parameters": dict(LLAMA3), "tie_word_embeddings": True}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.5}},
    ),
    "llama-yarn-wide": ("llama", {"rope_parameters": dict(YARN), "head_dim": 12}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": dict(DEEPSEEK)}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True, "num_key_value_heads": 6}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-wide": ("mistral", {"sliding_window": 140, "head_dim": 10}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-window": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
            "rms_norm_eps": 1e-3,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-bias-yarn": (
        "qwen3",
        {"head_dim": 16, "attention_bias": True, "rope_parameters": dict(YARN)},
    ),
    "gemma": ("gemma", {"head_dim": 20, "num_key_value_heads": 1}),
    "gemma-untied-bias": (
        "gemma",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "pythia": ("gpt_neox", {}),
    "neox-sequential": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 700.0,
                "partial_rotary_factor": 0.5,
                "factor": 2.0,
            },
        },
    ),
    "neox-no-attention-bias": (
        "gpt_neox",
        {
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "bloom": ("bloom", {}),
    "bloom-8-heads-untied": ("bloom", {"n_head": 8, "tie_word_embeddings": False}),
}


def foreign_config(name: str) -> Any:
    """A transformers configuration."""
    import transformers

    kind, changes = MODELS[name]
    values: dict[str, Any] = {**_GATED}
    if kind == "gpt_neox":
        values = {**_NEOX}
    if kind == "bloom":
        values = {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 3, "n_head": 6}
    return transformers.AutoConfig.for_model(kind, **(values | changes))


def foreign_model(name: str, seed: int = 7) -> Any:
    """In eval mode; every weight matters, and logits spread over about one unit."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        foreign_config(name), attn_implementation="eager"
    )
    make_loud(model)
    return model.eval()


@torch.no_grad()
def make_loud(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.3 * noise)
        elif "embed" in name or "lm_head" in name:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
