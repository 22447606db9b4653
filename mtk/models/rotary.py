"""Rotary position embedding (Su et al. 2021), in the half-split form of GPT-NeoX and Llama.

Shape suffixes: B batch, H heads, S sequence, D channels of a head, R rotated channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    positions: int, head_size: int, *, base: float, percent: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each fp32 [positions, R], of the first R = percent x D channels."""
    rotated = int(head_size * percent)
    exponents_R = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    frequencies = 1.0 / base**exponents_R
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    angles_PR = torch.cat((angles, angles), dim=-1)
    return angles_PR.cos(), angles_PR.sin()


def rotate(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of ``x_BHSD``.

    cos, sin: [S, R] for positions shared by the batch, or [B, 1, S, R].
    """
    rotated = cos.shape[-1]
    x_rot, x_pass = x_BHSD[..., :rotated], x_BHSD[..., rotated:]
    first, second = x_rot.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    out = x_rot * cos.to(x_rot.dtype) + turned * sin.to(x_rot.dtype)
    return out if x_pass.shape[-1] == 0 else torch.cat((out, x_pass), dim=-1)
