"""As :mod:`mtk.kernels.gemv`, of a matrix in INT8, FP8 or INT4: half or a quarter of the bytes.

Weights are read 8 or 16 bytes a thread and become fp32 in registers. A byte is one conversion. Four
bits are put into the mantissa of a number between 1 and 2 by a shift and a mask, which makes it
1 + q / 16; what that adds to the sum, of the offset of q too, is taken off once a group.
Layouts: :mod:`mtk.quantization.packing`. Needs Triton.

Shape suffixes: E inputs, F outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtk.kernels.dependent import launch_options

# Outputs of a program, and elements (bytes; words of eight inputs) of a row it reads at a time.
OUTPUTS, BYTES = 4, 4096
WORD_OUTPUTS, WORDS = 8, 512
WARPS = 4
# Bytes that a thread reads at once. The inputs that belong to 8 bytes are one load of a thread, in
# bf16; with 16 the compiler sends them around through shared memory instead.
VECTOR = 8
# Sizes of groups that kernels know.
GROUPS = (32, 64, 128)


@triton.jit
def _weights(weight, rows, at, WIDTH: tl.constexpr):
    # Read once: it need not stay in the caches.
    return tl.load(
        weight + rows[:, None] * WIDTH + at[None, :],
        mask=(at < WIDTH)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def _dot_bytes(
    weight, first, rows, x, norm,
    E: tl.constexpr, BYTES: tl.constexpr, VECTOR: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Of a few rows, whose first bytes are read already: their products with x, without scales, and
    the sum of x's squares."""
    lanes = tl.arange(0, BYTES)
    runs: tl.constexpr = BYTES // VECTOR
    sums = tl.zeros((rows.shape[0], runs), tl.float32)
    squares = tl.zeros((runs,), tl.float32)
    for start in tl.static_range(0, E, BYTES):
        at = tl.max_contiguous(start + lanes, VECTOR)
        inside = at < E
        part = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += tl.sum(tl.reshape(part * part, (runs, VECTOR)), 1)
            part *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
        w = first
        if start > 0:
            w = _weights(weight, rows, at, E)
        # A thread adds up what it read, which leaves it one sum a row to keep.
        products = w.to(tl.float32) * part[None, :]
        sums += tl.sum(tl.reshape(products, (rows.shape[0], runs, VECTOR)), 2)
    return tl.sum(sums, 1), tl.sum(squares, 0)


@triton.jit
def between_one_and_two(words, PLACE: tl.constexpr):
    """1 + q / 16 of the four bits at ``PLACE`` of each word."""
    # The upper four bits of a mantissa are 19 to 22.
    moved = words << 19 - 4 * PLACE if PLACE < 5 else words >> 4 * PLACE - 19
    return ((moved & 0x00780000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _dot_words(
    weight, first, rows, scales, x, norm,
    E: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """As :func:`_dot_bytes` of rows of INT4, with their scales."""
    lanes = tl.arange(0, WORDS)
    each: tl.constexpr = GROUP // 8
    groups: tl.constexpr = WORDS // each
    outputs: tl.constexpr = rows.shape[0]
    sums = tl.zeros((outputs, groups), tl.float32)
    squares = tl.zeros((WORDS,), tl.float32)
    for start in tl.static_range(0, E // 8, WORDS):
        at = start + lanes
        inside = at < E // 8
        w = first
        if start > 0:
            w = _weights(weight, rows, at, E // 8)
        inputs = (at // each) * GROUP + at % each
        products = tl.zeros((outputs, WORDS), tl.float32)
        offsets = tl.zeros((WORDS,), tl.float32)
        for place in tl.static_range(8):
            here = inputs + place * each
            part = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
            if NORMED:
                squares += part * part
                part *= tl.load(norm + here, mask=inside, other=0.0).to(tl.float32)
            offsets += part
            products += between_one_and_two(w, place) * part[None, :]
        # (q - 8) x = (16 (1 + q / 16) - 24) x
        products = 16.0 * products - 24.0 * offsets[None, :]
        of_groups = tl.sum(tl.reshape(products, (outputs, groups, each)), 2)
        group = start // each + tl.arange(0, groups)
        scale = tl.load(
            scales + rows[:, None] * (E // GROUP) + group[None, :],
            mask=(group < E // GROUP)[None, :],
            other=0.0,
        )
        sums += of_groups * scale
    return tl.sum(sums, 1), tl.sum(squares, 0)


@triton.jit
def _dot(
    weight, first, rows, scales, x, norm,
    E: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    if GROUP == 0:
        y, squares = _dot_bytes(weight, first, rows, x, norm, E, LANES, VECTOR, NORMED)
        y = y * tl.load(scales + rows)
    else:
        y, squares = _dot_words(weight, first, rows, scales, x, norm, E, LANES, GROUP, NORMED)
    return y, squares


@triton.jit
def _quantized_gemv(
    x, weight, scales, norm, bias, residual, out, eps,
    E: tl.constexpr, F: tl.constexpr, OUTPUTS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, GROUP: tl.constexpr, NORMED: tl.constexpr, BIASED: tl.constexpr,
    GATED: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = E if GROUP == 0 else E // 8
    lanes = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = lanes < F
    # The last rows again instead of rows that are not there.
    rows = tl.minimum(lanes, F - 1).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
    # On their way while the kernels before end: weights depend on none of them.
    start = tl.arange(0, LANES)
    if GROUP == 0:
        start = tl.max_contiguous(start, VECTOR)
    first = _weights(weight, rows, start, width)
    other = first
    if GATED:
        other = _weights(weight, rows + F, start, width)
    if EARLY:
        gdc_wait()
    y, squares = _dot(weight, first, rows, scales, x, norm, E, LANES, VECTOR, GROUP, NORMED)
    factor = 1.0
    if NORMED:
        factor = tl.rsqrt(squares / E + eps)
        y = y * factor
    if BIASED:
        y += tl.load(bias + rows).to(tl.float32)
    if GATED:
        up, _ = _dot(weight, other, rows + F, scales, x, norm, E, LANES, VECTOR, GROUP, NORMED)
        up = up * factor
        if BIASED:
            up += tl.load(bias + rows + F).to(tl.float32)
        y = y * tl.sigmoid(y) * up
    if ADDED:
        y = y.to(out.dtype.element_ty).to(tl.float32)
        y += tl.load(residual + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + lanes, y.to(out.dtype.element_ty), mask=inside)


def quantized_gemv(
    x_1E: Tensor,
    weight: Tensor,
    scale_FG: Tensor,
    *,
    bias_F: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual_1F: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x W^T [1, F], in the type of ``x_1E``, summed in fp32; all tensors contiguous.

    weight: int8 or float8_e4m3fn [F, E], or int32 [F, E / 8] with INT4 in groups of one of
    ``GROUPS``. scale_FG: fp32 [F, G], with G = 1 but for INT4. All else as for
    :func:`mtk.kernels.gemv.gemv`.
    """
    inputs, outputs = x_1E.shape[1], weight.shape[0]
    words = weight.dtype == torch.int32
    outputs //= 2 if gated else 1
    each, most = (WORD_OUTPUTS, WORDS) if words else (OUTPUTS, BYTES)
    lanes = min(most, max(16, triton.next_power_of_2(weight.shape[1])))
    out_1F = torch.empty((1, outputs), dtype=x_1E.dtype, device=x_1E.device)
    _quantized_gemv[(triton.cdiv(outputs, each),)](
        x_1E, weight, scale_FG, x_1E if norm is None else norm[0],
        x_1E if bias_F is None else bias_F, x_1E if residual_1F is None else residual_1F, out_1F,
        0.0 if norm is None else norm[1],
        E=inputs, F=outputs, OUTPUTS=each, LANES=lanes,
        VECTOR=VECTOR, GROUP=inputs // scale_FG.shape[1] if words else 0,
        NORMED=norm is not None, BIASED=bias_F is not None, GATED=gated,
        ADDED=residual_1F is not None, num_warps=WARPS, **launch_options(x_1E.device),
    )  # fmt: skip
    return out_1F
