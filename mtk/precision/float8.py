"""Linear layers in FP8 (Micikevicius et al. 2022), on torch's scaled matrix products.

Weights, activations and gradients are cast with one scale a tensor: from its own greatest
magnitude (``tensorwise``), or from those of the steps before (``delayed``), which saves a pass
over everything that is cast. Products add up in fp32 and give the model's type; main weights,
norms, attention, residual stream and optimizer stay as they are. Query, key and value read the
same tensor, and are one product; an MLP is cast in the middle of its activation.

Shape suffixes: B batch, S sequence, M = B x S tokens, E inputs, F outputs, R tensors that are
cast, H steps that are remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtk.config.float8 import Float8Options
from mtk.precision.float8_casts import Casts, activated, activated_backward, limit

TINY = 1e-12


@dataclass(frozen=True)
class Formats:
    """forward: of weights and activations. backward: of gradients."""

    forward: torch.dtype
    backward: torch.dtype

    @classmethod
    def of(cls, name: str) -> Formats:
        return cls(
            torch.float8_e4m3fn, torch.float8_e5m2 if name == "hybrid" else torch.float8_e4m3fn
        )


class Scaling(nn.Module):
    """Scales of the tensors of one layer, by number.

    gradients: which of them are. Delayed scaling has ``scale`` [R], fp32, and in ``amax`` [R] the
    greatest magnitudes of the step under way; :class:`mtk.precision.float8_history.History`
    moves them from step to step. Both are None where each tensor is scaled by its own.
    """

    scale: Tensor | None
    amax: Tensor | None

    def __init__(self, options: Float8Options, casts: Casts, gradients: tuple[bool, ...]) -> None:
        super().__init__()
        self.casts, self.formats = casts, Formats.of(options.fp8_format)
        self.gradients, self.margin = gradients, options.margin
        for name in ("scale", "amax"):
            delayed = options.fp8_recipe == "delayed"
            buffer = torch.zeros(len(gradients), device="meta") if delayed else None
            self.register_buffer(name, buffer, persistent=False)

    def dtype(self, tensor: int) -> torch.dtype:
        return self.formats.backward if self.gradients[tensor] else self.formats.forward

    def scale_of(self, tensor: int, make: Callable[[], Tensor]) -> Tensor:
        """fp32 scalar for casting what ``make`` gives, which is made only where the scale is its
        own."""
        if self.scale is not None:
            return self.scale[tensor]
        amax = make().abs().amax().float()
        return self.margin * limit(self.dtype(tensor)) / amax.clamp(min=TINY)

    def note(self, tensor: int, amax: Tensor) -> None:
        """Remember what was met, until the end of the step; evaluations leave no trace."""
        if self.amax is not None and self.training:
            self.amax[tensor].copy_(torch.maximum(self.amax[tensor], amax))

    def cast(self, tensor: int, x_MN: Tensor) -> Cast:
        scale = self.scale_of(tensor, lambda: x_MN)
        rows, turned, amax = self.casts.cast(x_MN, scale, self.dtype(tensor))
        self.note(tensor, amax)
        return Cast(rows, turned, scale.reciprocal())


@dataclass(frozen=True)
class Cast:
    """A tensor in FP8 by rows and turned, and what it has to be multiplied with."""

    rows: Tensor
    turned: Tensor
    inverse: Tensor


def _product(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, out: torch.dtype, *, fast: bool,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a [M, E] @ b.T [E, F], both in FP8 with E innermost. fast: products of many terms are added
    up in the tensor cores' own 14 bits; gradients are not (as in Transformer Engine)."""
    product: Tensor = torch._scaled_mm(
        a, b.t(), a_inverse, b_inverse, bias=bias, out_dtype=out, use_fast_accum=fast
    )
    return product


class _Linear(torch.autograd.Function):
    """x W^T + b; tensors of its scaling: x, W, gradient of the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_FE: Tensor, bias_F: Tensor | None, scaling: Scaling
    ) -> Tensor:
        x_ME = x.flatten(0, -2)
        own, weight = scaling.cast(0, x_ME), scaling.cast(1, weight_FE)
        ctx.save_for_backward(own.turned, weight.turned, own.inverse, weight.inverse)
        ctx.scaling, ctx.has_bias = scaling, bias_F is not None
        fast = x.is_cuda
        out = _product(
            own.rows, weight.rows, own.inverse, weight.inverse, x.dtype, fast=fast, bias=bias_F
        )
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x_EM, weight_EF, x_inverse, weight_inverse = ctx.saved_tensors
        grad_MF = grad.flatten(0, -2)
        own = ctx.scaling.cast(2, grad_MF)
        x_grad = _product(
            own.rows, weight_EF, own.inverse, weight_inverse, grad.dtype, fast=False
        ).view(*grad.shape[:-1], -1)
        weight_grad = _product(own.turned, x_EM, own.inverse, x_inverse, grad.dtype, fast=False)
        return x_grad, weight_grad, grad_MF.sum(0) if ctx.has_bias else None, None


class _Mlp(torch.autograd.Function):
    """act(x W1^T + b1) W2^T; tensors of its scaling: x, W1, act, W2, gradient of the output,
    gradient before the activation. Of gated activations W1 has both matrices, one below the
    other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first_FE: Tensor,
        bias_F: Tensor | None,
        second_EF: Tensor,
        kind: str,
        scaling: Scaling,
    ) -> Tensor:
        x_ME, fast = x.flatten(0, -2), x.is_cuda
        own, first, second = (
            scaling.cast(0, x_ME),
            scaling.cast(1, first_FE),
            scaling.cast(3, second_EF),
        )
        inner_MF = _product(
            own.rows, first.rows, own.inverse, first.inverse, x.dtype, fast=fast, bias=bias_F
        )
        middle = _activated(inner_MF, kind, scaling)
        out = _product(middle.rows, second.rows, middle.inverse, second.inverse, x.dtype, fast=fast)
        ctx.save_for_backward(
            own.turned, first.turned, middle.turned, second.turned, inner_MF,
            own.inverse, first.inverse, middle.inverse, second.inverse,
        )  # fmt: skip
        ctx.scaling, ctx.kind, ctx.has_bias = scaling, kind, bias_F is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, None, None]:
        x_EM, first_EF, middle_FM, second_FE, inner_MF, *inverses = ctx.saved_tensors
        x_inverse, first_inverse, middle_inverse, second_inverse = inverses
        scaling, dtype = ctx.scaling, grad.dtype
        own = scaling.cast(4, grad.flatten(0, -2))
        middle_grad = _product(own.rows, second_FE, own.inverse, second_inverse, dtype, fast=False)
        second_grad = _product(
            own.turned, middle_FM, own.inverse, middle_inverse, dtype, fast=False
        )
        inner, sums = _activated_backward(middle_grad, inner_MF, ctx.kind, scaling)
        x_grad = _product(inner.rows, first_EF, inner.inverse, first_inverse, dtype, fast=False)
        first_grad = _product(inner.turned, x_EM, inner.inverse, x_inverse, dtype, fast=False)
        bias_grad = sums.sum(0).to(dtype) if ctx.has_bias else None
        return x_grad.view(*grad.shape[:-1], -1), first_grad, bias_grad, second_grad, None, None


def _activated(inner_MF: Tensor, kind: str, scaling: Scaling) -> Cast:
    """act(x), cast without being written in between where its scale is known before."""
    own = scaling.scale_of(2, lambda: activated(inner_MF.float(), kind))
    rows, turned, amax = scaling.casts.activate(inner_MF, own, scaling.dtype(2), kind)
    scaling.note(2, amax)
    return Cast(rows, turned, own.reciprocal())


def _activated_backward(
    grad_MF: Tensor, inner_MF: Tensor, kind: str, scaling: Scaling
) -> tuple[Cast, Tensor]:
    """The gradient of x from that of act(x), cast likewise, and its sums over runs of rows."""
    own = scaling.scale_of(5, lambda: activated_backward(grad_MF.float(), inner_MF.float(), kind))
    rows, turned, amax, sums = scaling.casts.activate_backward(
        grad_MF, inner_MF, own, scaling.dtype(5), kind
    )
    scaling.note(5, amax)
    return Cast(rows, turned, own.reciprocal()), sums


def linear(x: Tensor, weight_FE: Tensor, bias_F: Tensor | None, scaling: Scaling) -> Tensor:
    """As ``F.linear``, the product in FP8. scaling: of three tensors."""
    out: Tensor = _Linear.apply(x, weight_FE, bias_F, scaling)  # type: ignore[no-untyped-call]
    return out


def mlp(
    x: Tensor,
    first_FE: Tensor,
    bias_F: Tensor | None,
    second_EF: Tensor,
    kind: str,
    scaling: Scaling,
) -> Tensor:
    """act(x W1^T + b1) W2^T with products in FP8. scaling: of six tensors."""
    out: Tensor = _Mlp.apply(  # type: ignore[no-untyped-call]
        x, first_FE, bias_F, second_EF, kind, scaling
    )
    return out
