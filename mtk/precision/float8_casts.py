"""What FP8 training does to tensors between matrix products: scaled casts, also of activations.

Each cast gives the tensor by rows and turned over, as the products of forward and backward need
it, and the greatest magnitude it met. Here in plain PyTorch, which runs everywhere; on CUDA
:mod:`mtk.kernels.float8` does the same in one pass.

Shape suffixes: M tokens, N channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.kernels import fused_on

# Activations that can be fused with the cast; gated ones multiply with a second half.
ACTIVATIONS = ("gelu-tanh", "gelu", "relu", "squared-relu", "swiglu", "geglu-tanh")
GATED = ("swiglu", "geglu-tanh")
# Rows whose gradients are summed at once where a bias needs them.
RUN = 64


def limit(dtype: torch.dtype) -> float:
    """The greatest number of a format (Micikevicius et al. 2022: 448 of E4M3, 57344 of E5M2)."""
    return torch.finfo(dtype).max


class Casts(Protocol):
    """The three casts. scale: fp32 scalar that values are multiplied with; those out of range
    become the greatest, NaN stays. Activations are rounded to the type of ``x`` first. Each
    returns the rows [M, N], the same turned [N, M], and max |x| before scaling, fp32 scalar."""

    def cast(
        self, x_MN: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def activate(
        self, x: Tensor, scale: Tensor, dtype: torch.dtype, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of act(x); of gated kinds x has both halves side by side."""

    def activate_backward(
        self, grad_MN: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype, kind: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the gradient of ``x``, whose sums over runs of rows come last, fp32 [runs, N]."""


@dataclass(frozen=True)
class PlainCasts:
    """In PyTorch's own operations."""

    def cast(
        self, x_MN: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x_MN.float()
        rows = (wide * scale).clamp(-limit(dtype), limit(dtype)).to(dtype)
        # Bytes are turned, as not every device copies FP8.
        turned = rows.view(torch.uint8).t().contiguous().view(dtype)
        return rows, turned, wide.abs().amax()

    def activate(
        self, x: Tensor, scale: Tensor, dtype: torch.dtype, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.cast(activated(x.float(), kind).to(x.dtype), scale, dtype)

    def activate_backward(
        self, grad_MN: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype, kind: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad = activated_backward(grad_MN.float(), x.float(), kind)
        runs = torch.stack([run.sum(0) for run in torch.split(grad, RUN)])
        return (*self.cast(grad.to(x.dtype), scale, dtype), runs)


class FusedCasts:
    """As kernels; needs CUDA and Triton."""

    def __init__(self) -> None:
        from mtk.kernels import float8  # imports Triton

        self.kernels: Any = float8
        self.kinds = dict(float8.KINDS)

    def cast(
        self, x_MN: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.kernels.cast(x_MN.contiguous(), scale, dtype)  # type: ignore[no-any-return]

    def activate(
        self, x: Tensor, scale: Tensor, dtype: torch.dtype, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        number, gated = self.kinds[kind], kind in GATED
        return self.kernels.activate_cast(x.contiguous(), scale, dtype, number, gated)  # type: ignore[no-any-return]

    def activate_backward(
        self, grad_MN: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype, kind: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number, gated = self.kinds[kind], kind in GATED
        found = self.kernels.activate_backward_cast(
            grad_MN.contiguous(), x.contiguous(), scale, dtype, number, gated
        )
        return found  # type: ignore[no-any-return]


def casts_on(device: torch.device) -> Casts:
    """The fastest casts for ``device``."""
    return FusedCasts() if fused_on(device) else PlainCasts()


def activated(x: Tensor, kind: str) -> Tensor:
    """act(x), or act(first half) * second half."""
    if kind in GATED:
        first, second = x.chunk(2, dim=-1)
        return _forward_and_slope(first, kind)[0] * second
    return _forward_and_slope(x, kind)[0]


def activated_backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """Gradient of ``x`` from that of :func:`activated`."""
    if kind in GATED:
        first, second = x.chunk(2, dim=-1)
        out, slope = _forward_and_slope(first, kind)
        return torch.cat((grad * second * slope, grad * out), dim=-1)
    return grad * _forward_and_slope(x, kind)[1]


def _forward_and_slope(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The activation that is not linear, and its derivative."""
    if kind in ("gelu-tanh", "geglu-tanh"):
        cube, root = 0.044715, 2.0 * math.sqrt(2.0 / math.pi)
        share = torch.sigmoid(root * (x + cube * x**3))
        return x * share, share + x * share * (1 - share) * root * (1 + 3 * cube * x**2)
    if kind == "gelu":
        share = 0.5 * (1 + torch.erf(x / math.sqrt(2.0)))
        return x * share, share + x * torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    if kind == "relu":
        return F.relu(x), (x > 0).to(x.dtype)
    if kind == "squared-relu":
        return F.relu(x) ** 2, 2 * F.relu(x)
    share = torch.sigmoid(x)  # swiglu
    return x * share, share + x * share * (1 - share)
