"""Mamba-2 computed straight from Hugging Face tensors, token after token.

A second opinion like :mod:`mtk.convert.reference_forward`: it shares no code with the model, and
runs the recurrence itself where the model works in chunks.

Shape suffixes: B batch, S sequence, E hidden size, C channels of the convolution, H heads,
P channels of a head, N state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def mamba2_forward(
    config: Mapping[str, Any], w: Weights, tokens_BS: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V], and the residual stream after the embedding and each layer."""
    epsilon = float(config.get("layer_norm_epsilon", 1e-5))
    x_BSE = w["backbone.embeddings.weight"][tokens_BS]
    states = [x_BSE]
    for layer in range(int(config["num_hidden_layers"])):
        name = f"backbone.layers.{layer}"
        normed = _rms(x_BSE, epsilon) * w[f"{name}.norm.weight"]
        x_BSE = x_BSE + _mixer(config, w, f"{name}.mixer", normed, epsilon)
        states.append(x_BSE)
    tied = bool(config.get("tie_word_embeddings"))
    output = w["backbone.embeddings.weight" if tied else "lm_head.weight"]
    return _rms(x_BSE, epsilon) * w["backbone.norm_f.weight"] @ output.T, states


def _rms(x: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon)


def _mixer(
    config: Mapping[str, Any], w: Weights, name: str, x_BSE: Tensor, epsilon: float
) -> Tensor:
    heads, head = int(config["num_heads"]), int(config["head_dim"])
    groups, size = int(config["n_groups"]), int(config["state_size"])
    inner, shared = heads * head, groups * size
    mixed = x_BSE @ w[f"{name}.in_proj.weight"].T
    if config.get("use_bias"):
        mixed = mixed + w[f"{name}.in_proj.bias"]
    z = mixed[..., :inner]
    steps = mixed[..., 2 * inner + 2 * shared :] + w[f"{name}.dt_bias"]
    steps = torch.log1p(torch.exp(-steps.abs())) + steps.clamp(min=0)
    if isinstance(config.get("time_step_limit"), list):
        low, high = (_finite(part) for part in config["time_step_limit"])
        steps = steps.clamp(min=low, max=high)
    xbc = _convolution(config, w, name, mixed[..., inner : 2 * inner + 2 * shared])
    rate_H = -torch.exp(w[f"{name}.A_log"])
    state_BHPN = torch.zeros(x_BSE.shape[0], heads, head, size, device=x_BSE.device)
    group_H = torch.arange(heads, device=x_BSE.device) // (heads // groups)
    outputs = []
    for token in range(x_BSE.shape[1]):
        x_BHP = xbc[:, token, :inner].reshape(-1, heads, head)
        b = xbc[:, token, inner : inner + shared].reshape(-1, groups, size)[:, group_H]
        c = xbc[:, token, inner + shared :].reshape(-1, groups, size)[:, group_H]
        step_BH = steps[:, token]
        kept = torch.exp(step_BH * rate_H)[:, :, None, None] * state_BHPN
        taken = torch.einsum("bh,bhp,bhn->bhpn", step_BH, x_BHP, b)
        state_BHPN = kept + taken
        y_BHP = torch.einsum("bhpn,bhn->bhp", state_BHPN, c) + w[f"{name}.D"][:, None] * x_BHP
        outputs.append(y_BHP.flatten(1))
    gated = torch.stack(outputs, dim=1) * z * torch.sigmoid(z)
    normed = torch.cat([_rms(part, epsilon) for part in gated.chunk(groups, dim=-1)], dim=-1)
    out = (normed * w[f"{name}.norm.weight"]) @ w[f"{name}.out_proj.weight"].T
    return out + w[f"{name}.out_proj.bias"] if config.get("use_bias") else out


def _convolution(config: Mapping[str, Any], w: Weights, name: str, x_BSC: Tensor) -> Tensor:
    width = int(config["conv_kernel"])
    out = torch.zeros_like(x_BSC)
    for back in range(min(width, x_BSC.shape[1])):
        # The last weight is for the token itself.
        weight_C = w[f"{name}.conv1d.weight"][:, 0, width - 1 - back]
        out[:, back:] += x_BSC[:, : x_BSC.shape[1] - back] * weight_C
    if config.get("use_conv_bias", True):
        out = out + w[f"{name}.conv1d.bias"]
    return out * torch.sigmoid(out)


def _finite(part: Any) -> float:
    return float(part) if isinstance(part, int | float) else float("inf")
