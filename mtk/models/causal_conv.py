"""A short causal convolution of each channel by itself, and silu, as in front of Mamba's scan.

Shape suffixes: B batch, S tokens, C channels, W tokens that the convolution looks at.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolve(Protocol):
    """silu(convolution + bias) of x [B, S, C] with weights [C, W], the last one for the token
    itself. before: the W - 1 inputs before the first token, None: zeros. documents_BS: a token
    looks at those of its own document only (not together with ``before``)."""

    def __call__(
        self,
        x_BSC: Tensor,
        weight_CW: Tensor,
        bias_C: Tensor | None,
        *,
        before: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> Tensor: ...


def convolve(
    x_BSC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    before: Tensor | None = None,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """As a sum of W shifted copies, in fp32."""
    length, width = x_BSC.shape[1], weight_CW.shape[1]
    whole = with_inputs_before(x_BSC, width, before).float()
    out = torch.zeros_like(x_BSC, dtype=torch.float32) if bias_C is None else bias_C.float()
    for place in range(width):
        term = whole[:, place : place + length] * weight_CW[:, place].float()
        back = width - 1 - place
        if documents_BS is not None and back:
            term = term * _same_document(documents_BS, back)
        out = out + term
    return F.silu(out).to(x_BSC.dtype)


def with_inputs_before(x_BSC: Tensor, width: int, before: Tensor | None) -> Tensor:
    """[B, W - 1 + S, C]."""
    if before is None:
        return F.pad(x_BSC, (0, 0, width - 1, 0))
    return torch.cat((before.to(x_BSC.dtype), x_BSC), dim=1)


def _same_document(documents_BS: Tensor, back: int) -> Tensor:
    """bool [B, S, 1]: no document ends between a token and the one ``back`` before it."""
    new_BS = torch.zeros_like(documents_BS)
    new_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    runs_BS = new_BS.cumsum(1)
    earlier_BS = F.pad(runs_BS, (back, 0), value=-1)[:, : runs_BS.shape[1]]
    return (runs_BS == earlier_BS)[..., None]


class Convolution(nn.Module):
    """The weights of a convolution over ``channels`` channels."""

    def __init__(self, channels: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))
