"""Products of a matrix and the vector of one token, with what lies around them.

Decoding a single sequence reads every weight once a token and computes next to nothing, so that
its speed is that of memory. What would be kernels of their own between the products (the norm
before, the activation and the residual sum behind) costs as much time as a small product there; it
is done in the products' kernels. Needs Triton.

Shape suffixes: E inputs, F outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtk.kernels.dependent import launch_options

# Outputs of a program, of gate and input matrix together and of others, and inputs it reads at a
# time; the fastest of 16 settings on an H200.
GATED_OUTPUTS, OUTPUTS = 4, 2
INPUTS = 2048
WARPS = 4


@triton.jit
def _weights(weight, rows, at, E: tl.constexpr):
    # Read once: it need not stay in the caches.
    return tl.load(
        weight + rows[:, None] * E + at[None, :],
        mask=(at < E)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def _dot_rows(
    weight, first, rows, x, norm, E: tl.constexpr, INPUTS: tl.constexpr, NORMED: tl.constexpr
):
    """Of a few rows of the matrix, whose first inputs are read already: their products with x, and
    the sum of x's squares."""
    lanes = tl.arange(0, INPUTS)
    sums = tl.zeros((rows.shape[0], INPUTS), tl.float32)
    squares = tl.zeros((INPUTS,), tl.float32)
    for start in tl.static_range(0, E, INPUTS):
        at = start + lanes
        inside = at < E
        part = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += part * part
            part *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
        w = first
        if start > 0:
            w = _weights(weight, rows, at, E)
        sums += w.to(tl.float32) * part[None, :]
    return tl.sum(sums, 1), tl.sum(squares, 0)


@triton.jit
def _gemv(
    x,
    weight,
    norm,
    bias,
    residual,
    out,
    eps,
    E: tl.constexpr,
    F: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    NORMED: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    lanes = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = lanes < F
    # The last rows again instead of rows that are not there.
    rows = tl.minimum(lanes, F - 1).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
    # On their way while the kernels before end: weights depend on none of them.
    first = _weights(weight, rows, tl.arange(0, INPUTS), E)
    other = first
    if GATED:
        other = _weights(weight, rows + F, tl.arange(0, INPUTS), E)
    if EARLY:
        gdc_wait()
    y, squares = _dot_rows(weight, first, rows, x, norm, E, INPUTS, NORMED)
    scale = 1.0
    if NORMED:
        scale = tl.rsqrt(squares / E + eps)
        y = y * scale
    if BIASED:
        y += tl.load(bias + rows).to(tl.float32)
    if GATED:
        up, _ = _dot_rows(weight, other, rows + F, x, norm, E, INPUTS, NORMED)
        up = up * scale
        if BIASED:
            up += tl.load(bias + rows + F).to(tl.float32)
        y = y * tl.sigmoid(y) * up
    if ADDED:
        y = y.to(out.dtype.element_ty).to(tl.float32)
        y += tl.load(residual + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + lanes, y.to(out.dtype.element_ty), mask=inside)


def gemv(
    x_1E: Tensor,
    weight_FE: Tensor,
    *,
    bias_F: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual_1F: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x W^T [1, F], in the type of ``x_1E``, summed in fp32; all tensors contiguous.

    norm: weights [E] and epsilon of an RMSNorm that x goes through first. gated: the first half of
    the matrix's rows are a gate, and the result is silu(gate) x the other half, [1, F / 2].
    residual: added at the end.
    """
    outputs, inputs = weight_FE.shape
    outputs //= 2 if gated else 1
    out_1F = torch.empty((1, outputs), dtype=x_1E.dtype, device=x_1E.device)
    each = GATED_OUTPUTS if gated else OUTPUTS
    _gemv[(triton.cdiv(outputs, each),)](
        x_1E, weight_FE, x_1E if norm is None else norm[0], x_1E if bias_F is None else bias_F,
        x_1E if residual_1F is None else residual_1F, out_1F, 0.0 if norm is None else norm[1],
        E=inputs, F=outputs, OUTPUTS=each, INPUTS=min(INPUTS, triton.next_power_of_2(inputs)),
        NORMED=norm is not None, BIASED=bias_F is not None, GATED=gated,
        ADDED=residual_1F is not None, num_warps=WARPS, **launch_options(x_1E.device),
    )  # fmt: skip
    return out_1F
