"""Casts to FP8 in one pass each: rows and their transpose, the activation in between, sums besides.

Matrix products in FP8 on Hopper take both factors with the summed dimension innermost. A tensor
that meets one product by rows and another by columns is therefore needed twice, and a tile of it
is written both ways while it is on the chip. Needs Triton.

Shape suffixes: M rows, N columns of what is cast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# Numbers of the activations in the kernels.
KINDS = {"gelu-tanh": 0, "gelu": 1, "relu": 2, "squared-relu": 3, "swiglu": 4, "geglu-tanh": 5}
# Tiles of a plain cast and of one with an activation, which needs more registers.
ROWS, WARPS = 64, 4
COLUMNS, ACTIVE_COLUMNS = 128, 64


@triton.jit
def _sigmoid(x):
    """By a reciprocal root, which is one instruction where a division is ten."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """The activation (of gated ones the factor that is not linear) and its derivative."""
    if KIND == 0 or KIND == 5:
        # tanh(y) = 2 sigmoid(2 y) - 1; the factor is 2 sqrt(2 / pi).
        square = x * x
        share = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        turn = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return x * share, share + x * share * (1.0 - share) * turn
    if KIND == 1:
        # 1 / sqrt(2), and 1 / sqrt(2 pi).
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if KIND == 2:
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    if KIND == 3:
        kept = tl.maximum(x, 0.0)
        return kept * kept, 2.0 * kept
    share = _sigmoid(x)
    return x * share, share + x * share * (1.0 - share)


@triton.jit
def _store(
    x, scale, rows, turned, m, n, M, N, width,
):  # fmt: skip
    """A tile in FP8 to both places; the hardware's casts make values out of range the greatest
    and leave NaN.

    It is rounded to bf16 first, as it would be without fusion, and turned as such: Triton 3.6
    moves numbers of 8 bits between threads wrongly.
    """
    x = x.to(tl.bfloat16)
    at = m[:, None].to(tl.int64) * width + n[None, :]
    out = (x.to(tl.float32) * scale).to(rows.dtype.element_ty)
    tl.store(rows + at, out, mask=(m[:, None] < M) & (n[None, :] < N))
    at = n[:, None].to(tl.int64) * M + m[None, :]
    out = (tl.trans(x).to(tl.float32) * scale).to(turned.dtype.element_ty)
    tl.store(turned + at, out, mask=(n[:, None] < N) & (m[None, :] < M))


@triton.jit
def _cast(
    x, scale, rows, turned, amax, M, N,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tile = tl.load(x + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0)
    tl.atomic_max(amax, tl.max(tl.abs(tile.to(tl.float32))))
    _store(tile, tl.load(scale), rows, turned, m, n, M, N, N)


@triton.jit
def _activate_cast(
    x, scale, rows, turned, amax, M, N,
    KIND: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (m[:, None] < M) & (n[None, :] < N)
    width = 2 * N if GATED else N
    at = x + m[:, None].to(tl.int64) * width + n[None, :]
    out, _ = _activate(tl.load(at, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        out = out * tl.load(at + N, mask=inside, other=0.0).to(tl.float32)
    tl.atomic_max(amax, tl.max(tl.abs(out)))
    _store(out, tl.load(scale), rows, turned, m, n, M, N, N)


@triton.jit
def _activate_backward_cast(
    grad, x, scale, rows, turned, amax, sums, M, N,
    KIND: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (m[:, None] < M) & (n[None, :] < N)
    width = 2 * N if GATED else N
    g = tl.load(grad + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0)
    g = g.to(tl.float32)
    at = x + m[:, None].to(tl.int64) * width + n[None, :]
    out, slope = _activate(tl.load(at, mask=inside, other=0.0).to(tl.float32), KIND)
    factor = tl.load(scale)
    if GATED:
        linear = tl.load(at + N, mask=inside, other=0.0).to(tl.float32)
        second = g * out
        tl.atomic_max(amax, tl.max(tl.abs(second)))
        tl.store(sums + tl.program_id(1) * width + N + n, tl.sum(second, 0), mask=n < N)
        _store(second, factor, rows + N, turned + N.to(tl.int64) * M, m, n, M, N, width)
        g = g * linear
    first = g * slope
    tl.atomic_max(amax, tl.max(tl.abs(first)))
    tl.store(sums + tl.program_id(1) * width + n, tl.sum(first, 0), mask=n < N)
    _store(first, factor, rows, turned, m, n, M, N, width)


def _grid(rows: int, columns: int, width: int) -> tuple[int, int]:
    return triton.cdiv(columns, width), triton.cdiv(rows, ROWS)


def _places(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        torch.empty(rows, columns, dtype=dtype, device=x.device),
        torch.empty(columns, rows, dtype=dtype, device=x.device),
        torch.zeros((), dtype=torch.float32, device=x.device),
    )


@triton_op("mtk::float8_cast", mutates_args={})
def cast(x_MN: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 of ``x_MN * scale`` [M, N] and its transpose [N, M], and max |x| (fp32 scalar)."""
    rows, columns = x_MN.shape
    out, turned, amax = _places(x_MN, rows, columns, dtype)
    wrap_triton(_cast)[_grid(rows, columns, COLUMNS)](
        x_MN, scale, out, turned, amax, rows, columns,
        BM=ROWS, BN=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return out, turned, amax


@triton_op("mtk::float8_activate_cast", mutates_args={})
def activate_cast(
    x: Tensor, scale: Tensor, dtype: torch.dtype, kind: int, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`cast` of act(x) [M, N]; gated: of act(x[:, :N]) * x[:, N:]."""
    rows, columns = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    out, turned, amax = _places(x, rows, columns, dtype)
    wrap_triton(_activate_cast)[_grid(rows, columns, ACTIVE_COLUMNS)](
        x, scale, out, turned, amax, rows, columns, KIND=kind, GATED=gated,
        BM=ROWS, BN=ACTIVE_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return out, turned, amax


@triton_op("mtk::float8_activate_backward_cast", mutates_args={})
def activate_backward_cast(
    grad_MN: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype, kind: int, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`cast` of the gradient of ``x`` (see :func:`activate_cast`), and the sums of its
    columns over runs of rows, fp32 [runs, columns of x]."""
    rows, columns = grad_MN.shape
    out, turned, amax = _places(x, rows, x.shape[1], dtype)
    grid = _grid(rows, columns, ACTIVE_COLUMNS)
    sums = torch.empty(grid[1], x.shape[1], dtype=torch.float32, device=x.device)
    wrap_triton(_activate_backward_cast)[grid](
        grad_MN, x, scale, out, turned, amax, sums, rows, columns, KIND=kind, GATED=gated,
        BM=ROWS, BN=ACTIVE_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return out, turned, amax, sums
