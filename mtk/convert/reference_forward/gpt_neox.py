"""GPT-NeoX and Pythia."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.reference_forward.plain import (
    Weights,
    activation,
    affine,
    attend,
    layer_norm,
    tied,
)
from mtk.convert.reference_forward.rope import Rotation


def gpt_neox(
    config: Mapping[str, Any], w: Weights, tokens_BS: Tensor
) -> tuple[Tensor, list[Tensor]]:
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    epsilon = float(config.get("layer_norm_eps", 1e-5))
    act = activation(str(config.get("hidden_act", "gelu")))
    depth, biased = width // heads, bool(config.get("attention_bias", True))
    parallel = bool(config.get("use_parallel_residual", True))
    turn = Rotation(config, depth, share=0.25)

    def mlp(x: Tensor, h: str) -> Tensor:
        y = layer_norm(x, w, f"{h}.post_attention_layernorm", epsilon)
        inner = act(affine(y, w, f"{h}.mlp.dense_h_to_4h", bias=True))
        return affine(inner, w, f"{h}.mlp.dense_4h_to_h", bias=True)

    x_BSE = w["gpt_neox.embed_in.weight"][tokens_BS]
    states = [x_BSE]
    for i in range(int(config["num_hidden_layers"])):
        h = f"gpt_neox.layers.{i}"
        y = layer_norm(x_BSE, w, f"{h}.input_layernorm", epsilon)
        mixed = affine(y, w, f"{h}.attention.query_key_value", bias=biased)
        parts = []
        for head in range(heads):
            start = 3 * head * depth
            q, k, v = (mixed[..., start + n * depth : start + (n + 1) * depth] for n in range(3))
            parts.append(attend(turn(q), turn(k), v))
        attended = affine(torch.cat(parts, dim=-1), w, f"{h}.attention.dense", bias=biased)
        added = attended + mlp(x_BSE if parallel else x_BSE + attended, h)
        x_BSE = x_BSE + added
        states.append(x_BSE)
    output = w["gpt_neox.embed_in.weight"] if tied(config, False) else w["embed_out.weight"]
    return layer_norm(x_BSE, w, "gpt_neox.final_layer_norm", epsilon) @ output.T, states
