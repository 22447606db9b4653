"""All of an attention layer between its projections, for one new token a sequence, in one kernel.

Each program takes one group of heads of one sequence: norms of queries and keys (if the layer has
them), rotation, storing the new key and value, and attention to all tokens through the table of
blocks. With few sequences their tokens are split over several programs; the one that ends last adds
the parts up (as in Flash-Decoding; Dao et al. 2023). Needs Triton. What it must equal are
:func:`mtk.models.rotary.rotate` and :func:`serving.paged.attention.attend_blocks`.

Shape suffixes: B sequences, K blocks, P tokens of a block, G key/value heads, H query heads, D
channels of a head, R slots, W columns of the table of blocks, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtk.kernels.dependent import launch_options
from mtk.kernels.few_rows import Workspace
from mtk.kernels.heads import HeadForm, Rows, head_width, turned

# Below any score; a number, as -inf less -inf is none.
LEAST = tl.constexpr(-1e30)
LOG2E = 1.4426950408889634
# Tokens that a program reads at a time, and its warps: where sequences are short, and where long.
SHORT, LONG = (16, 2), (32, 4)
SHORT_CONTEXT = 1024
# What keeps an H200's 132 processors busy: two programs for each.
PROGRAMS = 264
MOST_SPLITS = 16


@triton.jit
def _block_ids(blocks, start, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    at = start + tl.arange(0, TILE)
    return tl.load(blocks + at // BLOCK, mask=at < end, other=0)


@triton.jit
def _tile(
    store, ids, start, end, group, channels,
    groups: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys or values [TILE, channels] of tokens from ``start``, whose blocks are ``ids``."""
    at = start + tl.arange(0, TILE)
    # A block holds all tokens of one group, then those of the next.
    token = ((ids * groups + group) * BLOCK + at % BLOCK) * SIZE
    both = (at < end)[:, None] & (channels < SIZE)[None, :]
    return tl.load(store + token[:, None] + channels[None, :], mask=both, other=0.0)


@triton.jit
def _seen_before(
    queries, keys, values, k, v, ids, blocks, group, begin, end, scale, highest, total, mixed,
    channels, groups: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Go on with a softmax over stored tokens ``begin`` to ``end``. k, v: of the first tile. ids:
    blocks of the second. Each tile is on its way while the one before is computed."""
    for start in tl.range(begin, end, TILE, num_stages=1):
        next_k = _tile(keys, ids, start + TILE, end, group, channels, groups, SIZE, BLOCK, TILE)
        next_v = _tile(values, ids, start + TILE, end, group, channels, groups, SIZE, BLOCK, TILE)
        ids = _block_ids(blocks, start + 2 * TILE, end, BLOCK, TILE)
        seen = start + tl.arange(0, TILE) < end
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, LEAST)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
        k = next_k
        v = next_v
    return highest, total, mixed


@triton.jit
def _seen_by_one(
    query, keys, values, k, v, ids, blocks, group, begin, end, scale, highest, total, mixed,
    channels, groups: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The same of a single query [1, channels], without tensor cores, which would be idle. A tile
    is seen as [turns, lanes] of tokens, where a lane is what the same threads read in each turn,
    and has a softmax of its own; threads need each other at the end only."""
    turns: tl.constexpr = TILE // LANES
    highest_L = tl.full((LANES,), LEAST, tl.float32)
    total_L = tl.zeros((LANES,), tl.float32)
    mixed_LD = tl.zeros((LANES, WIDTH), tl.float32)
    q = query.to(tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=1):
        next_k = _tile(keys, ids, start + TILE, end, group, channels, groups, SIZE, BLOCK, TILE)
        next_v = _tile(values, ids, start + TILE, end, group, channels, groups, SIZE, BLOCK, TILE)
        ids = _block_ids(blocks, start + 2 * TILE, end, BLOCK, TILE)
        seen = start + tl.arange(0, TILE) < end
        scores = tl.where(seen, tl.sum(q * k.to(tl.float32), 1) * scale, LEAST)
        scores_RL = tl.reshape(scores, (turns, LANES))
        higher = tl.maximum(highest_L, tl.max(scores_RL, 0))
        weights_RL = tl.exp2(scores_RL - higher[None, :])
        weights_RL = tl.where(tl.reshape(seen, (turns, LANES)), weights_RL, 0.0)
        shrunk = tl.exp2(highest_L - higher)
        total_L = total_L * shrunk + tl.sum(weights_RL, 0)
        v_RLD = tl.reshape(v.to(tl.float32), (turns, LANES, WIDTH))
        mixed_LD = mixed_LD * shrunk[:, None] + tl.sum(weights_RL[:, :, None] * v_RLD, 0)
        highest_L = higher
        k = next_k
        v = next_v
    top = tl.maximum(highest, tl.max(highest_L, 0))
    part, before = tl.exp2(highest_L - top), tl.exp2(highest - top)
    total = total * before + tl.sum(total_L * part, 0)
    mixed = mixed * before[:, None] + tl.sum(mixed_LD * part[:, None], 0)[None, :]
    return top, total, mixed


@triton.jit
def _new_token(
    qkv, row, group, queries, keys, values, place, cosines, sines, norm, eps, position, scale,
    channels, H: tl.constexpr, groups: tl.constexpr, SIZE: tl.constexpr, ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Store the new key and value; scores [heads] of the token, and its value [channels]."""
    one = tl.arange(0, 1)
    own = (channels < SIZE)[None, :]
    start = qkv + (row * (H + 2 * groups) + H + group) * SIZE
    k = turned(
        start, one, own, channels, cosines, sines, norm, 1.0, eps, position,
        SIZE, ROTATED, INTERLEAVED, NORMED,
    )  # fmt: skip
    at_v = start + groups * SIZE + channels
    v = tl.load(at_v, mask=channels < SIZE, other=0.0)
    tl.store(keys + place + channels[None, :], k, mask=own)
    tl.store(values + place + channels, v, mask=channels < SIZE)
    score = tl.sum(queries.to(tl.float32) * k.to(tl.float32), 1) * scale
    return score, v.to(tl.float32)


@triton.jit
def _add_up(parts, log_sums, count, at, first, SPLITS: tl.constexpr, ROWS: tl.constexpr,
            WIDTH: tl.constexpr, own, heads_inside):  # fmt: skip
    """The parts of all splits: [ROWS, WIDTH]."""
    highest = tl.full((ROWS,), LEAST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in tl.static_range(SPLITS):
        log_sum = tl.load(log_sums + first + split * count, mask=heads_inside, other=LEAST)
        part = tl.load(parts + at + split * count * WIDTH, mask=own, other=0.0)
        higher = tl.maximum(highest, log_sum)
        shrunk, weight = tl.exp2(highest - higher), tl.exp2(log_sum - higher)
        total = total * shrunk + weight
        mixed = mixed * shrunk[:, None] + part * weight[:, None]
        highest = higher
    return mixed / total[:, None]


@triton.jit
def _decode(
    qkv, cosines, sines, query_norm, key_norm, keys, values, slots, positions, table, out, parts,
    log_sums, arrived, query_scale, eps, scale, window, columns,
    H: tl.constexpr, groups: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    WINDOWED: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    REPEATS: tl.constexpr = H // groups
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.program_id(2)
    if EARLY:
        gdc_launch_dependents()
    # On their way while the kernels before end: they are older than this step.
    position = tl.load(positions + row).to(tl.int32)
    blocks = table + tl.load(slots + row) * columns
    heads, channels = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    first = 0
    if WINDOWED:
        first = tl.maximum(position + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(position - first, TILE), SPLITS) * TILE
    begin = first + split * share
    end = tl.minimum(begin + share, position)
    ids = _block_ids(blocks, begin, end, BLOCK, TILE)
    k = _tile(keys, ids, begin, end, group, channels, groups, SIZE, BLOCK, TILE)
    v = _tile(values, ids, begin, end, group, channels, groups, SIZE, BLOCK, TILE)
    ids = _block_ids(blocks, begin + TILE, end, BLOCK, TILE)
    own_block = tl.load(blocks + position // BLOCK)
    if EARLY:
        gdc_wait()
    own = (heads < REPEATS)[:, None] & (channels < SIZE)[None, :]
    start = qkv + (row * (H + 2 * groups) + group * REPEATS) * SIZE
    queries = turned(
        start, heads, own, channels, cosines, sines, query_norm, query_scale, eps, position,
        SIZE, ROTATED, INTERLEAVED, NORMED,
    )  # fmt: skip
    highest = tl.full((ROWS,), LEAST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    if split == SPLITS - 1:
        place = ((own_block * groups + group) * BLOCK + position % BLOCK) * SIZE
        highest, new_v = _new_token(
            qkv, row, group, queries, keys, values, place, cosines, sines, key_norm, eps, position,
            scale, channels, H, groups, SIZE, ROTATED, INTERLEAVED, NORMED,
        )  # fmt: skip
        total += 1.0
        mixed += new_v[None, :]
    if ROWS == 1:
        highest, total, mixed = _seen_by_one(
            queries, keys, values, k, v, ids, blocks, group, begin, end, scale, highest, total,
            mixed, channels, groups, SIZE, BLOCK, TILE, WIDTH, LANES,
        )  # fmt: skip
    else:
        highest, total, mixed = _seen_before(
            queries, keys, values, k, v, ids, blocks, group, begin, end, scale, highest, total,
            mixed, channels, groups, SIZE, BLOCK, TILE,
        )  # fmt: skip
    # A split without tokens has a total of 0, and the least logarithm: it takes no part.
    total = tl.where(total == 0, 1.0, total)
    mixed = mixed / total[:, None]
    head = group * REPEATS + heads
    at_out = out + (row * H + head[:, None]) * SIZE + channels[None, :]
    if SPLITS == 1:
        tl.store(at_out, mixed.to(out.dtype.element_ty), mask=own)
    else:
        count = tl.num_programs(0) * H
        first_head = row * H + head
        at = first_head[:, None] * WIDTH + channels[None, :]
        inside = heads < REPEATS
        tl.store(parts + at + split * count * WIDTH, mixed, mask=own)
        tl.store(log_sums + first_head + split * count, highest + tl.log2(total), mask=inside)
        # All threads' stores come before the count.
        tl.debug_barrier()
        counter = arrived + row * groups + group
        if tl.atomic_add(counter, 1) == SPLITS - 1:
            mixed = _add_up(
                parts, log_sums, count, at, first_head, SPLITS, ROWS, WIDTH, own, inside
            )
            tl.store(at_out, mixed.to(out.dtype.element_ty), mask=own)
            tl.store(counter, 0)


def decode_attention(
    qkv: Tensor,
    keys_KGPD: Tensor,
    values_KGPD: Tensor,
    rows: Rows,
    workspace: Workspace,
    form: HeadForm,
    window: int | None = None,
    *,
    early: bool = True,
) -> Tensor:
    """[B, H, D]: each row's queries to its tokens and the new one, which is stored.

    qkv: [B, (H + 2G) x D] contiguous, the heads of queries, keys and values side by side, as the
    projections give them. early: tokens of the cache may be read before the kernels in front have
    ended; not if these write some of them.
    """
    _, groups, block, size = keys_KGPD.shape
    batch = qkv.shape[0]
    heads = qkv.shape[1] // size - 2 * groups
    tile, warps = SHORT if rows.context <= SHORT_CONTEXT else LONG
    width = head_width(size)
    splits = max(1, min(PROGRAMS // (batch * groups), -(-rows.context // tile), MOST_SPLITS))
    out = qkv.new_empty((batch, heads, size))
    parts, log_sums = out, out
    if splits > 1:
        parts = out.new_empty(splits * batch * heads * width, dtype=torch.float32)
        log_sums = out.new_empty(splits * batch * heads, dtype=torch.float32)
    cosines, sines = (qkv, qkv) if form.tables is None else form.tables
    query_norm, key_norm, eps = (qkv, qkv, 0.0) if form.norms is None else form.norms
    _decode[(batch, groups, splits)](
        qkv, cosines, sines, query_norm, key_norm, keys_KGPD, values_KGPD, rows.slots_N,
        rows.positions_N, rows.table_RW, out, parts, log_sums, workspace.arrived,
        form.query_scale, eps, LOG2E * size**-0.5, window or 0, rows.table_RW.shape[1],
        H=heads, groups=groups, SIZE=size, BLOCK=block,
        ROWS=_rows(heads // groups), WIDTH=width, TILE=tile,
        SPLITS=splits, ROTATED=form.rotated,
        INTERLEAVED=form.interleaved, NORMED=form.norms is not None, WINDOWED=window is not None,
        LANES=min(tile, max(1, warps * 512 // qkv.element_size() // width)), num_warps=warps,
        **launch_options(qkv.device, early=early),
    )  # fmt: skip
    return out


def _rows(repeats: int) -> int:
    """Heads of a program: tensor cores want 16."""
    return 1 if repeats == 1 else max(16, triton.next_power_of_2(repeats))
