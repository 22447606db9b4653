"""What happens to heads between a layer's projection and attention: scaling, norms, rotation, and
storing keys and values in the cache. Needs Triton.

It must equal :func:`mtk.models.rotary.rotate` and the norms' own modules: numbers are rounded to
the model's type where those round.

Shape suffixes: N tokens, K blocks, P tokens of a block, G key/value heads, H query heads, D
channels of a head, R slots, W columns of the table of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# Heads of a tile.
HEADS = 16


@dataclass(frozen=True)
class Rows:
    """Where tokens are. slots: int64 [N], rows of the table int64 [R, W] of blocks. positions:
    int64 [N], in each one's sequence. context: most tokens that any sequence can have."""

    slots_N: Tensor
    positions_N: Tensor
    table_RW: Tensor
    context: int


@dataclass(frozen=True)
class HeadForm:
    """What is done to heads. query_scale: of queries, before all else. norms: weights [D] of
    RMSNorms of queries and keys, and their epsilon. tables: cosines and sines, fp32 [positions,
    rotated channels], None rotates nothing."""

    tables: tuple[Tensor, Tensor] | None = None
    norms: tuple[Tensor, Tensor, float] | None = None
    interleaved: bool = False
    query_scale: float = 1.0

    @property
    def rotated(self) -> int:
        return 0 if self.tables is None else self.tables[0].shape[1]


@triton.jit
def turned(
    start, heads, own, channels, cosines, sines, norm, scale, eps, position,
    SIZE: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Heads [heads, channels] at ``start``, scaled, normed and rotated."""
    kind: tl.constexpr = start.dtype.element_ty
    at = start + heads[:, None] * SIZE
    x = tl.load(at + channels[None, :], mask=own, other=0.0).to(tl.float32)
    x = (x * scale).to(kind).to(tl.float32)
    root = tl.full((heads.shape[0],), 1.0, tl.float32)
    if NORMED:
        root = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
        w = tl.load(norm + channels, mask=channels < SIZE, other=0.0).to(tl.float32)
        x = (x * root[:, None] * w[None, :]).to(kind).to(tl.float32)
    if ROTATED > 0:
        turns = channels < ROTATED
        if INTERLEAVED:
            partner = channels ^ 1
            negative = channels % 2 == 0
        else:
            half: tl.constexpr = ROTATED // 2
            partner = tl.where(channels < half, channels + half, channels - half)
            negative = channels < half
        other = tl.load(at + partner[None, :], mask=own & turns[None, :], other=0.0)
        other = (other.to(tl.float32) * scale).to(kind).to(tl.float32)
        if NORMED:
            w = tl.load(norm + partner, mask=turns, other=0.0).to(tl.float32)
            other = (other * root[:, None] * w[None, :]).to(kind).to(tl.float32)
        table = position * ROTATED + channels
        cosine = tl.load(cosines + table, mask=turns, other=1.0).to(kind).to(tl.float32)
        sine = tl.load(sines + table, mask=turns, other=0.0).to(kind).to(tl.float32)
        x = x * cosine[None, :] + tl.where(negative[None, :], -other, other) * sine[None, :]
    return x.to(kind)


@triton.jit
def _spread(
    qkv, cosines, sines, query_norm, key_norm, keys, values, slots, positions, table, q_out, k_out,
    stride_q, stride_k, query_scale, eps, columns,
    H: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    block = tl.load(table + tl.load(slots + token) * columns + position // BLOCK)
    channels = tl.arange(0, WIDTH)
    start = qkv + token * (H + 2 * G) * SIZE
    for first in tl.static_range(0, H, HEADS):
        heads = first + tl.arange(0, HEADS)
        own = (heads < H)[:, None] & (channels < SIZE)[None, :]
        q = turned(
            start, heads, own, channels, cosines, sines, query_norm, query_scale, eps, position,
            SIZE, ROTATED, INTERLEAVED, NORMED,
        )  # fmt: skip
        at = heads[:, None] * SIZE + channels[None, :]
        tl.store(q_out + token * stride_q + at, q, mask=own)
    for first in tl.static_range(0, G, HEADS):
        heads = first + tl.arange(0, HEADS)
        own = (heads < G)[:, None] & (channels < SIZE)[None, :]
        at = heads[:, None] * SIZE + channels[None, :]
        place = ((block * G + heads[:, None]) * BLOCK + position % BLOCK) * SIZE + channels[None, :]
        v = tl.load(start + (H + G) * SIZE + at, mask=own, other=0.0)
        k = turned(
            start + H * SIZE, heads, own, channels, cosines, sines, key_norm, 1.0, eps, position,
            SIZE, ROTATED, INTERLEAVED, NORMED,
        )  # fmt: skip
        tl.store(k_out + token * stride_k + at, k, mask=own)
        tl.store(keys + place, k, mask=own)
        tl.store(values + place, v, mask=own)


def turn_and_store(
    qkv: Tensor, keys_KGPD: Tensor, values_KGPD: Tensor, rows: Rows, form: HeadForm
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, H, D] and keys [N, G, D] as attention needs them, and values [N, G, D], a view of
    ``qkv``; keys and values are in their places in the cache too.

    qkv: [N, (H + 2G) x D] contiguous, the heads of queries, keys and values side by side.
    """
    _, groups, block, size = keys_KGPD.shape
    count = qkv.shape[0]
    heads = qkv.shape[1] // size - 2 * groups
    q_NHD = qkv.new_empty((count, heads, size))
    k_NGD = qkv.new_empty((count, groups, size))
    cosines, sines = (qkv, qkv) if form.tables is None else form.tables
    query_norm, key_norm, eps = (qkv, qkv, 0.0) if form.norms is None else form.norms
    _spread[(count,)](
        qkv, cosines, sines, query_norm, key_norm, keys_KGPD, values_KGPD, rows.slots_N,
        rows.positions_N, rows.table_RW, q_NHD, k_NGD, q_NHD.stride(0), k_NGD.stride(0),
        form.query_scale, eps, rows.table_RW.shape[1], H=heads, G=groups, SIZE=size, BLOCK=block,
        HEADS=min(HEADS, triton.next_power_of_2(max(heads, groups))), WIDTH=head_width(size),
        ROTATED=form.rotated, INTERLEAVED=form.interleaved, NORMED=form.norms is not None,
        num_warps=4,
    )  # fmt: skip
    v_NGD = qkv.view(count, -1, size)[:, heads + groups :]
    return q_NHD, k_NGD, v_NGD


def head_width(size: int) -> int:
    """Channels of a tile of heads."""
    return max(16, 1 << (size - 1).bit_length())
