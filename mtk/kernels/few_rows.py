"""Products of a matrix and a few rows, with what lies around them.

From two to some dozens of sequences, a step of decoding still takes as long as its weights take to
be read. A program multiplies some rows of the matrix with all rows of x on tensor cores; where the
matrix has too few rows to keep the GPU busy, several programs share them, each with a part of the
inputs, and the last one to end adds the parts up in their order, so that the result does not depend
on who that is. What is around a product in a layer is done in it:

- RMSNorm before it: x comes multiplied with the norm's weights, and the product is scaled by the
  root mean square of x's rows, whose sums of squares come along (:class:`Normed`);
- silu(gate) x up, bias and residual sum behind it;
- and for the product after it, the next norm's weights and sums of squares.

Needs Triton. Shape suffixes: M rows, E inputs, F outputs, T tiles of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtk.kernels.dependent import launch_options

# Most rows that are worth it: with more, libraries' products are as fast.
MOST_ROWS = 64
# Programs that keep an H200's 132 processors busy, and outputs of each.
PROGRAMS = 264
OUTPUTS = 64
# Programs that can take part in sums at once.
PLACES = 65536


@dataclass(frozen=True)
class Normed:
    """Rows before an RMSNorm. weighted_ME: times its weights. squares_TM: fp32, sums of squares of
    the rows' parts, whose sum is that of the row. eps: of the norm."""

    weighted_ME: Tensor
    squares_TM: Tensor
    eps: float


@dataclass(frozen=True)
class Shape:
    """How a product is cut. outputs: rows of the matrix of a program (of gate and input matrix
    each, if there are two). splits: programs that share their inputs. first: inputs whose weights
    are read before the kernels in front have ended; step: read at a time after that, in so many
    stages."""

    outputs: int
    splits: int
    first: int
    step: int = 64
    stages: int = 4
    warps: int = 4


class Workspace:
    """What programs that share a product leave to each other; one product at a time may use it."""

    def __init__(self, device: torch.device) -> None:
        self.arrived = torch.zeros(PLACES, dtype=torch.int32, device=device)


@triton.jit
def _weights(matrix, f, at, E: tl.constexpr):
    # Read once: they need not stay in the caches.
    return tl.load(
        matrix + f[:, None] * E + at[None, :],
        mask=(at < E)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def _inputs(x, m, at, rows, E: tl.constexpr):
    """[inputs, rows]"""
    both = (m < rows)[None, :] & (at < E)[:, None]
    return tl.load(x + m[None, :] * E + at[:, None], mask=both, other=0.0)


@triton.jit
def _dot_rest(
    weight, x, f, m, y, up, begin, end, rows,
    E: tl.constexpr, F: tl.constexpr, STEP: tl.constexpr, GATED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add the products with inputs ``begin`` to ``end``."""
    for start in tl.range(begin, end, STEP, num_stages=STAGES):
        at = start + tl.arange(0, STEP)
        part = _inputs(x, m, at, rows, E)
        y = tl.dot(_weights(weight, f, at, E), part, y, input_precision="ieee")
        if GATED:
            up = tl.dot(_weights(weight, f + F, at, E), part, up, input_precision="ieee")
    return y, up


@triton.jit
def _sum_parts(
    parts, y, up, at, size, arrived, tile, split, SPLITS: tl.constexpr, GATED: tl.constexpr
):
    """Leave this program's part; whether it is the last one, and then the sums."""
    halves: tl.constexpr = 2 if GATED else 1
    own = parts + (tile * SPLITS + split) * halves * size + at
    tl.store(own, y)
    if GATED:
        tl.store(own + size, up)
    # All threads' stores come before the count.
    tl.debug_barrier()
    last = tl.atomic_add(arrived + tile, 1) == SPLITS - 1
    if last:
        y = tl.zeros_like(y)
        up = y
        for part in tl.static_range(SPLITS):
            place = parts + (tile * SPLITS + part) * halves * size + at
            y += tl.load(place)
            if GATED:
                up += tl.load(place + size)
        tl.store(arrived + tile, 0)
    return last, y, up


@triton.jit
def _finish(
    y, up, f, m, rows, bias, squares, eps, residual, out, next_norm, next_out, next_squares, tile,
    E: tl.constexpr, F: tl.constexpr, M_TILE: tl.constexpr, SQUARES: tl.constexpr,
    NORMED: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    inside = f < F
    both = inside[:, None] & (m < rows)[None, :]
    at = m[None, :].to(tl.int64) * F + f[:, None]
    if NORMED:
        tiles: tl.constexpr = triton.next_power_of_2(SQUARES)
        t = tl.arange(0, tiles)
        seen = (t < SQUARES)[:, None] & (m < rows)[None, :]
        total = tl.sum(tl.load(squares + t[:, None] * rows + m[None, :], mask=seen, other=0.0), 0)
        scale = tl.rsqrt(total / E + eps)
        y = y * scale[None, :]
        up = up * scale[None, :]
    if BIASED:
        y += tl.load(bias + f, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + F + f, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        y = y * tl.sigmoid(y) * up
    if ADDED:
        y = y.to(out.dtype.element_ty).to(tl.float32)
        y += tl.load(residual + at, mask=both, other=0.0).to(tl.float32)
    result = y.to(out.dtype.element_ty)
    tl.store(out + at, result, mask=both)
    if NEXT:
        y = tl.where(both, result.to(tl.float32), 0.0)
        weighted = y * tl.load(next_norm + f, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(next_out + at, weighted.to(out.dtype.element_ty), mask=both)
        tl.store(next_squares + tile * rows + m, tl.sum(y * y, 0), mask=m < rows)


@triton.jit
def _product(
    x, weight, bias, squares, residual, out, next_norm, next_out, next_squares, parts, arrived,
    eps, rows,
    E: tl.constexpr, F: tl.constexpr, M_TILE: tl.constexpr, F_TILE: tl.constexpr,
    FIRST: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr,
    STAGES: tl.constexpr, SQUARES: tl.constexpr, NORMED: tl.constexpr, BIASED: tl.constexpr,
    GATED: tl.constexpr, ADDED: tl.constexpr, NEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    lanes = tile * F_TILE + tl.arange(0, F_TILE)
    # The last rows again instead of rows that are not there.
    f = tl.minimum(lanes, F - 1).to(tl.int64)
    m = tl.arange(0, M_TILE)
    if EARLY:
        gdc_launch_dependents()
    # On their way while the kernels before end: weights depend on none of them.
    begin = split * SHARE
    at = begin + tl.arange(0, FIRST)
    w = _weights(weight, f, at, E)
    w_up = w
    if GATED:
        w_up = _weights(weight, f + F, at, E)
    if EARLY:
        gdc_wait()
    part = _inputs(x, m, at, rows, E)
    y = tl.dot(w, part, input_precision="ieee")
    up = y
    if GATED:
        up = tl.dot(w_up, part, input_precision="ieee")
    if SHARE > FIRST:
        end = tl.minimum(begin + SHARE, E)
        y, up = _dot_rest(
            weight, x, f, m, y, up, begin + FIRST, end, rows, E, F, STEP, GATED, STAGES
        )
    last = True
    if SPLITS > 1:
        at = tl.arange(0, F_TILE)[:, None] * M_TILE + m[None, :]
        last, y, up = _sum_parts(
            parts, y, up, at, F_TILE * M_TILE, arrived, tile, split, SPLITS, GATED
        )
    if last:
        _finish(
            y, up, lanes, m, rows, bias, squares, eps, residual, out, next_norm, next_out,
            next_squares, tile, E, F, M_TILE, SQUARES, NORMED, BIASED, GATED, ADDED, NEXT,
        )  # fmt: skip


def choose_shape(outputs: int, inputs: int, *, gated: bool, item_bytes: int = 2) -> Shape:
    """Near what was fastest for matrices of 2,048 to 131,072 outputs on an H200
    (docs/benchmarks/serving.md)."""
    tiles, splits = -(-outputs // OUTPUTS), 1
    # A gate and its other half are twice the work.
    programs, least = (PROGRAMS // 2, 1024) if gated else (PROGRAMS, 512)
    while tiles * splits * 2 <= programs and inputs // (splits * 2) >= least:
        splits *= 2
    if gated:
        first, stages = 64, 5
    elif inputs // splits <= least:
        first, stages = least, 2
    else:
        first, stages = 128 if splits == 1 else 256, 4
    return Shape(OUTPUTS, splits, first * 2 // item_bytes, stages=max(2, stages * 2 // item_bytes))


def _share(inputs: int, cut: Shape) -> int:
    """Inputs of each program: what it reads first and whole steps after that."""
    each = -(-inputs // cut.splits)
    if each <= cut.first:
        return cut.first
    return cut.first + -(-(each - cut.first) // cut.step) * cut.step


def product(
    x: Tensor | Normed,
    weight_FE: Tensor,
    workspace: Workspace,
    *,
    bias_F: Tensor | None = None,
    residual_MF: Tensor | None = None,
    gated: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """x W^T [M, F], summed in fp32, for at most 64 rows; all tensors contiguous.

    gated: the first half of the matrix's rows are a gate, and the result is silu(gate) x the other
    half, [M, F / 2]. residual: added at the end.
    """
    return _launch(x, weight_FE, workspace, bias_F, residual_MF, gated, None, shape)[0]


def product_before_norm(
    x: Tensor | Normed,
    weight_FE: Tensor,
    workspace: Workspace,
    norm: tuple[Tensor, float],
    *,
    bias_F: Tensor | None = None,
    residual_MF: Tensor | None = None,
    shape: Shape | None = None,
) -> tuple[Tensor, Normed]:
    """As :func:`product`, and the result as the next product needs it, of which ``norm``, weights
    [F] and epsilon, comes first."""
    out_MF, following = _launch(x, weight_FE, workspace, bias_F, residual_MF, False, norm, shape)
    assert following is not None
    return out_MF, following


def _launch(
    x: Tensor | Normed,
    weight_FE: Tensor,
    workspace: Workspace,
    bias_F: Tensor | None,
    residual_MF: Tensor | None,
    gated: bool,
    norm: tuple[Tensor, float] | None,
    shape: Shape | None,
) -> tuple[Tensor, Normed | None]:
    x_ME = x.weighted_ME if isinstance(x, Normed) else x
    rows, inputs = x_ME.shape
    outputs = weight_FE.shape[0] // (2 if gated else 1)
    cut = shape or choose_shape(outputs, inputs, gated=gated, item_bytes=x_ME.element_size())
    tiles, share = -(-outputs // cut.outputs), _share(inputs, cut)
    splits = -(-inputs // share)
    m_tile = max(16, triton.next_power_of_2(rows))
    out = x_ME.new_empty((rows, outputs))
    after, parts = None, out
    if norm is not None:
        squares = out.new_empty((tiles, rows), dtype=torch.float32)
        after = Normed(torch.empty_like(out), squares, norm[1])
    if splits > 1:
        size = tiles * splits * cut.outputs * m_tile * (2 if gated else 1)
        parts = out.new_empty(size, dtype=torch.float32)
    _product[(tiles * splits,)](
        x_ME, weight_FE, x_ME if bias_F is None else bias_F,
        x.squares_TM if isinstance(x, Normed) else x_ME,
        x_ME if residual_MF is None else residual_MF, out, x_ME if norm is None else norm[0],
        out if after is None else after.weighted_ME,
        out if after is None else after.squares_TM, parts, workspace.arrived,
        x.eps if isinstance(x, Normed) else 0.0, rows,
        E=inputs, F=outputs, M_TILE=m_tile, F_TILE=cut.outputs, FIRST=cut.first, STEP=cut.step,
        SPLITS=splits, SHARE=share, STAGES=cut.stages,
        SQUARES=x.squares_TM.shape[0] if isinstance(x, Normed) else 1,
        NORMED=isinstance(x, Normed), BIASED=bias_F is not None, GATED=gated,
        ADDED=residual_MF is not None, NEXT=norm is not None, num_warps=cut.warps,
        **launch_options(x_ME.device),
    )  # fmt: skip
    return out, after


@triton.jit
def _weigh(x, norm, out, squares, E: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    lanes = tl.arange(0, WIDTH)
    inside = lanes < E
    part = tl.load(x + row * E + lanes, mask=inside, other=0.0).to(tl.float32)
    weighted = part * tl.load(norm + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * E + lanes, weighted.to(out.dtype.element_ty), mask=inside)
    tl.store(squares + row, tl.sum(part * part, 0))


def before_norm(x_ME: Tensor, norm: tuple[Tensor, float]) -> Normed:
    """Contiguous rows as the product after ``norm``, weights [E] and epsilon, needs them."""
    rows, inputs = x_ME.shape
    weighted, squares = torch.empty_like(x_ME), x_ME.new_empty((1, rows), dtype=torch.float32)
    _weigh[(rows,)](
        x_ME, norm[0], weighted, squares, E=inputs, WIDTH=triton.next_power_of_2(inputs),
        num_warps=4, **launch_options(x_ME.device),
    )  # fmt: skip
    return Normed(weighted, squares, norm[1])
