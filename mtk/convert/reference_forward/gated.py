"""Llama and its kin: Mistral (a window), Qwen2 (biases in query, key and value), Qwen3 (norms of
heads), Gemma (norms around zero, scaled embeddings, GEGLU); Mixtral, Qwen-MoE and GLM-4-MoE with
experts instead of MLPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.reference_forward.experts import has_experts, mixture
from mtk.convert.reference_forward.plain import Weights, activation, affine, attend, tied
from mtk.convert.reference_forward.rope import Rotation

# Heads of keys, and channels of a head, where config.json says nothing of them.
GROUPS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16}
GROUPS |= {"mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4, "glm4_moe": 8}
EPSILONS = {"mixtral": 1e-5, "glm4_moe": 1e-5}
DEPTHS = {"qwen3": 128, "gemma": 256}


def gated(config: Mapping[str, Any], w: Weights, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    kind, heads = str(config["model_type"]), int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads", GROUPS.get(kind)) or heads)
    width = int(config["hidden_size"])
    depth = int(config.get("head_dim", DEPTHS.get(kind)) or width // heads)
    epsilon = float(config.get("rms_norm_eps", EPSILONS.get(kind, 1e-6)))
    base = {"rope_theta": 1e6} if kind == "mixtral" else {}
    turn = Rotation({**base, **config}, depth, 0.5 if kind == "glm4_moe" else 1.0)
    normed = kind in ("qwen3", "qwen3_moe") or bool(config.get("use_qk_norm"))
    gemma = kind == "gemma"
    act = activation("gelu_new" if gemma else str(config.get("hidden_act", "silu")))
    stated = bool(config.get("attention_bias"))
    biased = {"q": stated, "k": stated, "v": stated, "o": stated}
    if kind in ("qwen2", "qwen2_moe", "glm4_moe"):
        own = {"qwen2": True, "qwen2_moe": bool(config.get("qkv_bias", True))}.get(kind, stated)
        biased = {"q": own, "k": own, "v": own, "o": False}
    mlp_bias = kind == "llama" and bool(config.get("mlp_bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        scale = w[f"{name}.weight"] + (1.0 if gemma else 0.0)
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon) * scale

    x_BSE = w["model.embed_tokens.weight"][tokens_BS]
    if gemma:
        x_BSE = x_BSE * math.sqrt(width)
    states = [x_BSE]
    for i in range(int(config["num_hidden_layers"])):
        a, m = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        y = norm(x_BSE, f"model.layers.{i}.input_layernorm")
        q, k, v = (affine(y, w, f"{a}.{name}_proj", bias=biased[name]) for name in "qkv")
        window = _window(config, kind, i)
        parts = []
        for head in range(heads):
            group = head // (heads // groups)
            own_part, shared = (slice(n * depth, (n + 1) * depth) for n in (head, group))
            query, key = q[..., own_part], k[..., shared]
            if normed:
                query, key = norm(query, f"{a}.q_norm"), norm(key, f"{a}.k_norm")
            parts.append(attend(turn(query), turn(key), v[..., shared], window=window))
        x_BSE = x_BSE + affine(torch.cat(parts, dim=-1), w, f"{a}.o_proj", bias=biased["o"])
        y = norm(x_BSE, f"model.layers.{i}.post_attention_layernorm")
        if has_experts(config, i):
            x_BSE = x_BSE + mixture(config, w, i, y)
        else:
            gate = act(affine(y, w, f"{m}.gate_proj", bias=mlp_bias))
            inner = gate * affine(y, w, f"{m}.up_proj", bias=mlp_bias)
            x_BSE = x_BSE + affine(inner, w, f"{m}.down_proj", bias=mlp_bias)
        states.append(x_BSE)
    shares = tied(config, gemma)
    output = w["model.embed_tokens.weight"] if shares else w["lm_head.weight"]
    return norm(x_BSE, "model.norm") @ output.T, states


def _window(config: Mapping[str, Any], kind: str, layer: int) -> int | None:
    """Tokens that a token of this layer sees; None for all before it."""
    size = config.get("sliding_window", 4096)
    if kind == "mistral":
        return None if size is None else int(size)
    if kind == "mixtral":
        return int(config["sliding_window"]) if config.get("sliding_window") else None
    if not kind.startswith("qwen") or not config.get("use_sliding_window") or size is None:
        return None
    if kind == "qwen3_moe":
        return int(size)
    kinds = config.get("layer_types")
    if kinds is None:
        return int(size) if layer >= int(config.get("max_window_layers", 28)) else None
    return int(size) if kinds[layer] == "sliding_attention" else None
