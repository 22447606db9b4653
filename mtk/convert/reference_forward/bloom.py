"""BLOOM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.reference_forward.plain import (
    Weights,
    affine,
    attend,
    layer_norm,
    tanh_gelu,
    tied,
)


def slope(head: int, heads: int) -> float:
    """What head number ``head`` of ``heads`` takes off for each token of distance."""
    whole = 1
    while whole * 2 <= heads:
        whole *= 2
    if head < whole:
        return float(2 ** (-8 * (head + 1) / whole))
    return float(2 ** (-8 * (2 * (head - whole) + 1) / (2 * whole)))


def bloom(config: Mapping[str, Any], w: Weights, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    width, heads = int(config["hidden_size"]), int(config["n_head"])
    epsilon = float(config.get("layer_norm_epsilon", 1e-5))
    depth = width // heads
    x_BSE = w["transformer.word_embeddings.weight"][tokens_BS]
    x_BSE = layer_norm(x_BSE, w, "transformer.word_embeddings_layernorm", epsilon)
    states = [x_BSE]
    for i in range(int(config["n_layer"])):
        h = f"transformer.h.{i}"
        y = layer_norm(x_BSE, w, f"{h}.input_layernorm", epsilon)
        mixed = affine(y, w, f"{h}.self_attention.query_key_value", bias=True)
        parts = []
        for head in range(heads):
            start = 3 * head * depth
            q, k, v = (mixed[..., start + n * depth : start + (n + 1) * depth] for n in range(3))
            parts.append(attend(q, k, v, slope=slope(head, heads)))
        x_BSE = x_BSE + affine(torch.cat(parts, dim=-1), w, f"{h}.self_attention.dense", bias=True)
        y = layer_norm(x_BSE, w, f"{h}.post_attention_layernorm", epsilon)
        inner = tanh_gelu(affine(y, w, f"{h}.mlp.dense_h_to_4h", bias=True))
        x_BSE = x_BSE + affine(inner, w, f"{h}.mlp.dense_4h_to_h", bias=True)
        states.append(x_BSE)
    embedding = w["transformer.word_embeddings.weight"]
    output = embedding if tied(config, True) else w["lm_head.weight"]
    return layer_norm(x_BSE, w, "transformer.ln_f", epsilon) @ output.T, states
