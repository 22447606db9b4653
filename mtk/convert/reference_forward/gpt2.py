"""GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.reference_forward.plain import Weights, activation, attend, layer_norm, tied


def gpt2(config: Mapping[str, Any], w: Weights, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    width, heads = int(config["n_embd"]), int(config["n_head"])
    epsilon = float(config.get("layer_norm_epsilon", 1e-5))
    act = activation(str(config.get("activation_function", "gelu_new")))
    depth = width // heads

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x_BSE = w["transformer.wte.weight"][tokens_BS]
    x_BSE = x_BSE + w["transformer.wpe.weight"][: tokens_BS.shape[1]]
    states = [x_BSE]
    for i in range(int(config["n_layer"])):
        h = f"transformer.h.{i}"
        mixed = conv(layer_norm(x_BSE, w, f"{h}.ln_1", epsilon), f"{h}.attn.c_attn")
        parts = []
        for head in range(heads):
            q, k, v = (
                mixed[..., part * width + head * depth : part * width + (head + 1) * depth]
                for part in range(3)
            )
            parts.append(attend(q, k, v))
        x_BSE = x_BSE + conv(torch.cat(parts, dim=-1), f"{h}.attn.c_proj")
        inner = act(conv(layer_norm(x_BSE, w, f"{h}.ln_2", epsilon), f"{h}.mlp.c_fc"))
        x_BSE = x_BSE + conv(inner, f"{h}.mlp.c_proj")
        states.append(x_BSE)
    output = w["transformer.wte.weight"] if tied(config, True) else w["lm_head.weight"]
    return layer_norm(x_BSE, w, "transformer.ln_f", epsilon) @ output.T, states
