"""Rotary position embedding (Su et al. 2021): channel c turns with c + R/2, as in GPT-NeoX and
Llama, or interleaved, 2c with 2c + 1.

For longer sequences than a model was trained on its frequencies are scaled: all alike (linear;
Chen et al. 2023), low ones only (llama3; Dubey et al. 2024), or by how often a channel turns
within the original positions (yarn; Peng et al. 2023).

Shape suffixes: B batch, H heads, S sequence, D channels of a head, R rotated channels, F = R/2
frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtk.config.model import ModelConfig


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each fp32 [positions, R], of the first R = percent x D channels."""
    angles = torch.arange(config.positions, dtype=torch.float32)[:, None] * frequencies(config)
    if config.rotary_interleaved:
        angles_PR = angles.repeat_interleave(2, dim=-1)
    else:
        angles_PR = torch.cat((angles, angles), dim=-1)
    size = config.yarn_attention if config.rope_scaling_type == "yarn" else 1.0
    return angles_PR.cos() * size, angles_PR.sin() * size


def frequencies(config: ModelConfig) -> Tensor:
    """Angle by which each pair of channels turns a position, fp32 [F]."""
    rotated = int(config.head_size * config.rotary_percent)
    powers_F = config.rotary_base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    plain_F = 1.0 / powers_F
    if config.rope_scaling_type == "linear":
        return plain_F / config.rope_scaling_factor
    if config.rope_scaling_type == "llama3":
        return _llama3(plain_F, config)
    if config.rope_scaling_type == "yarn":
        return _yarn(powers_F, config)
    return plain_F


def _llama3(plain_F: Tensor, config: ModelConfig) -> Tensor:
    """Long wavelengths are scaled in full, short ones not, those between in part."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    lengths_F = 2 * math.pi / plain_F
    turns_F = config.rope_original_positions / lengths_F
    share_F = ((turns_F - low) / (high - low)).clamp(0.0, 1.0)
    between_F = (1 - share_F) * plain_F / config.rope_scaling_factor + share_F * plain_F
    scaled_F = torch.where(share_F == 0.0, plain_F / config.rope_scaling_factor, between_F)
    return torch.where(share_F == 1.0, plain_F, scaled_F)


def _yarn(powers_F: Tensor, config: ModelConfig) -> Tensor:
    """Channels that turn often are not scaled, those that hardly do are, with a ramp between."""
    rotated = 2 * powers_F.shape[0]

    def channel(turns: float) -> float:
        """The pair of channels that turns so often within the original positions."""
        length = config.rope_original_positions / (turns * 2 * math.pi)
        return rotated * math.log(length) / (2 * math.log(config.rotary_base))

    low, high = channel(config.yarn_beta_fast), channel(config.yarn_beta_slow)
    if config.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    span = high - low if high != low else 0.001
    scaled_F = ((torch.arange(len(powers_F), dtype=torch.float32) - low) / span).clamp(0, 1)
    kept_F = 1 - scaled_F
    return 1.0 / (config.rope_scaling_factor * powers_F) * (1 - kept_F) + 1.0 / powers_F * kept_F


def rotate(x_BHSD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first R channels of ``x_BHSD``.

    cos, sin: [S, R] for positions shared by the batch, or [B, 1, S, R].
    """
    rotated = cos.shape[-1]
    x_rot, x_pass = x_BHSD[..., :rotated], x_BHSD[..., rotated:]
    if interleaved:
        turned = torch.stack((-x_rot[..., 1::2], x_rot[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x_rot.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    out = x_rot * cos.to(x_rot.dtype) + turned * sin.to(x_rot.dtype)
    return out if x_pass.shape[-1] == 0 else torch.cat((out, x_pass), dim=-1)
