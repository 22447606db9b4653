"""Products of few rows with a matrix in INT8, FP8 or INT4, and the whole matrix in another type.

With a few dozen rows the time of a product is still that of reading the matrix: it is read in its
own bits, once, and becomes the rows' type in registers, for tensor cores. With more rows the
arithmetic counts, and a matrix written out once serves all of them. Layouts:
:mod:`mtk.quantization.packing`. Needs Triton.

Shape suffixes: M rows, E inputs, F outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtk.kernels.quantized_gemv import between_one_and_two

# Rows of a program; more rows are a matrix product's.
MOST_ROWS = 64
# Inputs that a program reads at a time, and how many such parts are on their way.
BYTES, STAGES, WARPS = 256, 4, 4
# Outputs of a program: as many as rows at least, as it reads all rows too; fewer of a matrix with
# less outputs than ENOUGH, so that there are programs for the whole GPU.
OUTPUTS, FEW_OUTPUTS, ENOUGH = 32, 16, 4096
# Groups that tensor cores can take: 16 words at a time.
GROUP = 128
# Elements of a program that writes a matrix out.
BLOCK = 4096


@triton.jit
def _store(y, bias, out, m, f, rows, M, F: tl.constexpr, BIASED: tl.constexpr):
    if BIASED:
        y += tl.load(bias + rows).to(tl.float32)[:, None]
    at = m[None, :].to(tl.int64) * F + f[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(m < M)[None, :] & (f < F)[:, None])


@triton.jit
def _rows_bytes(
    x, weight, scales, bias, out, M, E: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BM: tl.constexpr, BYTES: tl.constexpr, STAGES: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    rows = tl.minimum(f, F - 1).to(tl.int64)
    m = tl.arange(0, BM)
    y = tl.zeros((BF, BM), tl.float32)
    for start in tl.range(0, E, BYTES, num_stages=STAGES):
        at = start + tl.arange(0, BYTES)
        inside = at < E
        w = tl.load(weight + rows[:, None] * E + at[None, :], mask=inside[None, :], other=0.0)
        # A matrix is the left factor, so that its rows may be many and those of x few.
        part = tl.load(
            x + m[None, :] * E + at[:, None], mask=inside[:, None] & (m < M)[None, :], other=0.0
        )
        y = tl.dot(w.to(x.dtype.element_ty), part, y, input_precision="ieee")
    y = y * tl.load(scales + rows)[:, None]
    _store(y, bias, out, m, f, rows, M, F, BIASED)


@triton.jit
def _rows_words(
    x, weight, scales, bias, out, M, E: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr,
    BF: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    each: tl.constexpr = GROUP // 8
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    rows = tl.minimum(f, F - 1).to(tl.int64)
    m = tl.arange(0, BM)
    lanes = tl.arange(0, each)
    y = tl.zeros((BF, BM), tl.float32)
    for group in tl.range(0, E // GROUP, num_stages=STAGES):
        words = tl.load(weight + rows[:, None] * (E // 8) + group * each + lanes[None, :])
        scale = tl.load(scales + rows * (E // GROUP) + group)
        of_group = tl.zeros((BF, BM), tl.float32)
        for place in tl.static_range(8):
            at = group * GROUP + place * each + lanes
            part = tl.load(x + m[None, :] * E + at[:, None], mask=(m < M)[None, :], other=0.0)
            # (q - 8) / 16, which every type holds exactly.
            w = (between_one_and_two(words, place) - 1.5).to(x.dtype.element_ty)
            of_group = tl.dot(w, part, of_group, input_precision="ieee")
        y += of_group * (16.0 * scale)[:, None]
    _store(y, bias, out, m, f, rows, M, F, BIASED)


def quantized_rows(
    x_ME: Tensor, weight: Tensor, scale_FG: Tensor, bias_F: Tensor | None = None
) -> Tensor:
    """x W^T [M, F] of at most ``MOST_ROWS`` rows, in their type, summed in fp32; all tensors
    contiguous. weight, scale_FG: as for :func:`mtk.kernels.quantized_gemv.quantized_gemv`; groups
    of INT4 are ``GROUP``."""
    (rows, inputs), outputs = x_ME.shape, weight.shape[0]
    out_MF = torch.empty((rows, outputs), dtype=x_ME.dtype, device=x_ME.device)
    block = max(16, triton.next_power_of_2(rows))
    each = max(block, OUTPUTS if outputs >= ENOUGH else FEW_OUTPUTS)
    grid = (triton.cdiv(outputs, each),)
    bias = x_ME if bias_F is None else bias_F
    sizes = {
        "E": inputs, "F": outputs, "BF": each, "BM": block,
        "STAGES": STAGES, "BIASED": bias_F is not None, "num_warps": WARPS,
    }  # fmt: skip
    if weight.dtype == torch.int32:
        _rows_words[grid](x_ME, weight, scale_FG, bias, out_MF, rows, GROUP=GROUP, **sizes)
    else:
        lanes = min(BYTES, max(16, triton.next_power_of_2(inputs)))
        _rows_bytes[grid](x_ME, weight, scale_FG, bias, out_MF, rows, BYTES=lanes, **sizes)
    return out_MF


@triton.jit
def _write_bytes(weight, scales, out, E: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < E
    w = tl.load(weight + row * E + at, mask=inside, other=0.0).to(tl.float32) * tl.load(
        scales + row
    )
    tl.store(out + row * E + at, w.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _write_words(
    weight, scales, out, E: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    each: tl.constexpr = GROUP // 8
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < E // 8
    words = tl.load(weight + row * (E // 8) + at, mask=inside, other=0.0)
    scale = tl.load(scales + row * (E // GROUP) + at // each, mask=inside, other=0.0)
    for place in tl.static_range(8):
        w = (16.0 * between_one_and_two(words, place) - 24.0) * scale
        here = out + row * E + (at // each) * GROUP + place * each + at % each
        tl.store(here, w.to(out.dtype.element_ty), mask=inside)


def written_out(weight: Tensor, scale_FG: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """The matrix [F, E] in ``dtype``; INT4 in groups that are a power of two of at least 8."""
    outputs = weight.shape[0]
    out_FE = torch.empty((outputs, inputs), dtype=dtype, device=weight.device)
    words = weight.dtype == torch.int32
    block = min(BLOCK // 8 if words else BLOCK, triton.next_power_of_2(weight.shape[1]))
    grid = (outputs, triton.cdiv(weight.shape[1], block))
    if words:
        group = inputs // scale_FG.shape[1]
        _write_words[grid](weight, scale_FG, out_FE, E=inputs, GROUP=group, BLOCK=block)
    else:
        _write_bytes[grid](weight, scale_FG, out_FE, E=inputs, BLOCK=block)
    return out_FE
