"""Decoding on a cache of blocks: rotate and store a new token's heads, and attend to all of them.

Each program reads the keys and values of one group of heads of one sequence, through the table of
its blocks and up to its own length, so that a batch of unequal sequences costs what its tokens do.
With few sequences their tokens are split over several programs, whose results a second kernel adds
up (as in Flash-Decoding; Dao et al. 2023). Needs Triton. What it must equal is
:func:`serving.paged.attention.attend_blocks`.

Shape suffixes: B sequences, K blocks, P tokens of a block, G key/value heads, H query heads, D
channels of a head, R slots, W columns of the table of blocks, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtk.kernels.dependent import launch_options

# Tokens read at a time.
TILE = 64
# What keeps an H200's 132 processors busy: two programs for each.
PROGRAMS = 264
MOST_SPLITS = 64
WARPS = 4
# Below any score; a number, as -inf less -inf is none.
LEAST = tl.constexpr(-1e30)
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Rows:
    """Which sequences decode. slots: int64 [B], rows of the table int64 [R, W] of blocks.
    positions: int64 [B], of each one's new token. context: most tokens that any can have."""

    slots_B: Tensor
    positions_B: Tensor
    table_RW: Tensor
    context: int


@triton.jit
def _attend(
    q,
    keys,
    values,
    slots,
    positions,
    table,
    out,
    log_sums,
    scale,
    window,
    columns,
    stride_q,
    groups: tl.constexpr,
    REPEATS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + row).to(tl.int32) + 1
    blocks = table + tl.load(slots + row) * columns
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, TILE), SPLITS) * TILE
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    heads, channels = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = group * REPEATS + heads
    own = (heads < REPEATS)[:, None] & (channels < SIZE)[None, :]
    at_q = row.to(tl.int64) * stride_q + head[:, None] * SIZE + channels[None, :]
    queries = tl.load(q + at_q, mask=own, other=0.0)
    highest = tl.full((ROWS,), LEAST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        seen = at < end
        block = tl.load(blocks + at // BLOCK, mask=seen, other=0)
        # A block holds all tokens of one group, then those of the next.
        token = ((block * groups + group) * BLOCK + at % BLOCK) * SIZE
        both = seen[:, None] & (channels < SIZE)[None, :]
        k = tl.load(keys + token[:, None] + channels[None, :], mask=both, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, LEAST)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(weights, 1)
        v = tl.load(values + token[:, None] + channels[None, :], mask=both, other=0.0)
        mixed = mixed * shrunk[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    # A split without tokens has a total of 0, and the least logarithm: it takes no part.
    total = tl.where(total == 0, 1.0, total)
    mixed = mixed / total[:, None]
    all_heads: tl.constexpr = groups * REPEATS
    place = ((row * SPLITS + split) * all_heads + head).to(tl.int64)
    result = mixed.to(out.dtype.element_ty)
    tl.store(out + place[:, None] * SIZE + channels[None, :], result, mask=own)
    if SPLITS > 1:
        tl.store(log_sums + place, highest + tl.log2(total), mask=heads < REPEATS)


@triton.jit
def _add_up(
    parts,
    log_sums,
    out,
    heads: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    splits, channels = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    place = ((row * SPLITS + splits) * heads + head).to(tl.int64)
    log_sum = tl.load(log_sums + place)
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))
    at = place[:, None] * SIZE + channels[None, :]
    part = tl.load(parts + at, mask=(channels < SIZE)[None, :], other=0.0)
    mixed = tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0)
    place_out = out + (row.to(tl.int64) * heads + head) * SIZE + channels
    tl.store(place_out, mixed.to(out.dtype.element_ty), mask=channels < SIZE)


def attend_rows(
    q_BHD: Tensor, keys_KGPD: Tensor, values_KGPD: Tensor, rows: Rows, window: int | None = None
) -> Tensor:
    """[B, H, D]: each row's query to its tokens, the new one among them, which is stored already.
    Heads of ``q_BHD`` lie side by side; rows of it may lie apart."""
    batch, heads, size = q_BHD.shape
    _, groups, block, _ = keys_KGPD.shape
    repeats, splits = heads // groups, _splits(batch * groups, rows.context)
    out = torch.empty((batch, heads, size), dtype=q_BHD.dtype, device=q_BHD.device)
    parts, log_sums = out, out
    if splits > 1:
        parts = out.new_empty((batch, splits, heads, size), dtype=torch.float32)
        log_sums = out.new_empty((batch, splits, heads), dtype=torch.float32)
    width = max(16, triton.next_power_of_2(size))
    _attend[(batch, groups, splits)](
        q_BHD, keys_KGPD, values_KGPD, rows.slots_B, rows.positions_B, rows.table_RW, parts,
        log_sums, LOG2E * size**-0.5, window or 0, rows.table_RW.shape[1], q_BHD.stride(0), groups,
        REPEATS=repeats, SIZE=size, BLOCK=block, ROWS=max(16, triton.next_power_of_2(repeats)),
        WIDTH=width, TILE=TILE, SPLITS=splits, WINDOWED=window is not None, num_warps=WARPS,
        **launch_options(q_BHD.device),
    )  # fmt: skip
    if splits > 1:
        _add_up[(batch, heads)](
            parts, log_sums, out, heads, SIZE=size, WIDTH=width, SPLITS=splits, num_warps=WARPS,
            **launch_options(q_BHD.device),
        )  # fmt: skip
    return out


def _splits(programs: int, context: int) -> int:
    """A power of two, no more than there are tiles."""
    wanted = min(PROGRAMS // programs, -(-context // TILE), MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


@triton.jit
def _rotate_and_store(
    heads,
    cosines,
    sines,
    slots,
    positions,
    table,
    q,
    keys,
    values,
    query_scale,
    columns,
    queries: tl.constexpr,
    groups: tl.constexpr,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, WIDTH)
    inside = channels < SIZE
    position = tl.load(positions + row)
    start = heads + (row.to(tl.int64) * (queries + 2 * groups) + head) * SIZE
    x = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
    if head < queries:
        x = (x * query_scale).to(heads.dtype.element_ty).to(tl.float32)
    if ROTATED > 0:
        turns = (channels < ROTATED) & (head < queries + groups)
        if INTERLEAVED:
            partner = channels ^ 1
            negative = channels % 2 == 0
        else:
            half: tl.constexpr = ROTATED // 2
            partner = tl.where(channels < half, channels + half, channels - half)
            negative = channels < half
        other = tl.load(start + partner, mask=turns, other=0.0).to(tl.float32)
        if head < queries:
            other = (other * query_scale).to(heads.dtype.element_ty).to(tl.float32)
        at = position * ROTATED + channels
        # In the type of the model, as where whole prompts are rotated.
        cosine = tl.load(cosines + at, mask=turns, other=1.0).to(heads.dtype.element_ty)
        sine = tl.load(sines + at, mask=turns, other=0.0).to(heads.dtype.element_ty)
        turned = tl.where(negative, -other, other)
        x = x * cosine.to(tl.float32) + turned * sine.to(tl.float32)
    result = x.to(heads.dtype.element_ty)
    if head < queries:
        tl.store(q + (row.to(tl.int64) * queries + head) * SIZE + channels, result, mask=inside)
    else:
        block = tl.load(table + tl.load(slots + row) * columns + position // BLOCK)
        group = (head - queries) % groups
        place = ((block * groups + group) * BLOCK + position % BLOCK) * SIZE + channels
        if head < queries + groups:
            tl.store(keys + place, result, mask=inside)
        else:
            tl.store(values + place, result, mask=inside)


def rotate_and_store(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    keys_KGPD: Tensor,
    values_KGPD: Tensor,
    rows: Rows,
    *,
    query_scale: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """Queries [B, H, D], rotated; keys, rotated, and values go to their places in the cache.

    qkv: [B, (H + 2G) x D] contiguous, the heads of queries, keys and values side by side. tables:
    cosines and sines, fp32 [positions, rotated channels]; None rotates nothing.
    """
    _, groups, block, size = keys_KGPD.shape
    batch, heads = qkv.shape[0], qkv.shape[1] // size
    queries = heads - 2 * groups
    q_BHD = torch.empty((batch, queries, size), dtype=qkv.dtype, device=qkv.device)
    cosines, sines = (qkv, qkv) if tables is None else tables
    _rotate_and_store[(batch, heads)](
        qkv, cosines, sines, rows.slots_B, rows.positions_B, rows.table_RW, q_BHD, keys_KGPD,
        values_KGPD, query_scale, rows.table_RW.shape[1], queries, groups, SIZE=size,
        ROTATED=0 if tables is None else cosines.shape[1], BLOCK=block,
        WIDTH=triton.next_power_of_2(size), INTERLEAVED=interleaved, num_warps=1,
        **launch_options(qkv.device),
    )  # fmt: skip
    return q_BHD
