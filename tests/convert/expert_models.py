"""Randomly initialised models with experts, of odd shapes, built by transformers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

VOCAB = 301
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What each family calls its sizes of experts.
EXPERTS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
    },
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_experts_per_tok": 2}),
    "mixtral-window-tied": (
        "mixtral",
        {"sliding_window": 9, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    ),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen2-moe-some-dense-normalised": (
        "qwen2_moe",
        {
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "intermediate_size": 56,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-moe-one-expert": ("qwen2_moe", {"num_experts_per_tok": 1, "qkv_bias": False}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True, "head_dim": 10}),
    "qwen3-moe-bias-every-second": (
        "qwen3_moe",
        {"attention_bias": True, "decoder_sparse_step": 2, "num_key_value_heads": 6},
    ),
    "glm4-moe": ("glm4_moe", {"first_k_dense_replace": 1, "intermediate_size": 56}),
    "glm4-moe-groups": (
        "glm4_moe",
        {
            "first_k_dense_replace": 0,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
}


def expert_model(name: str, seed: int = 7) -> Any:
    """In eval mode; every weight matters, and logits spread over about one unit."""
    import transformers

    kind, changes = MODELS[name]
    values: dict[str, Any] = {**SIZES, **EXPERTS[kind], **changes}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **values), attn_implementation="eager"
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
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.empty(buffer.shape).normal_(generator=generator))
