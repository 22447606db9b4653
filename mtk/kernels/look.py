"""What a step needs to know of its logits, in one visit. Needs Triton.

Shape suffixes: B rows, V vocabulary, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mtk.kernels.dependent import launch_options
from mtk.kernels.few_rows import Workspace

# Logits of a program at least, and programs that keep the GPU busy.
BLOCK = 1024
PROGRAMS = 264
MOST_SPLITS = 128


@triton.jit
def _better(value, at, other, other_at):
    """The higher of two values, the first one of equals; NaN is the highest, as in torch."""
    nan, other_nan = value != value, other != other
    wins = (value > other) | (nan & (other_nan == 0))
    same = (value == other) | (nan & other_nan)
    wins = wins | (same & (at < other_at))
    return tl.where(wins, value, other), tl.where(wins, at, other_at)


@triton.jit
def _look(
    logits, tokens, finite, slots, kept, values, ids, sound, arrived, stride, V, drawable, share,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, KEPT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, split = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    start = logits + row.to(tl.int64) * stride
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.full((BLOCK,), 0, tl.int32) + (split * share + lanes)
    good = tl.full((BLOCK,), 1, tl.int32)
    for first in range(split * share, tl.minimum((split + 1) * share, V), BLOCK):
        place = first + lanes
        inside = place < tl.minimum((split + 1) * share, V)
        x = tl.load(start + place, mask=inside, other=0.0).to(tl.float32)
        good = good & (tl.abs(x) < float("inf")).to(tl.int32)
        x = tl.where(inside & (place < drawable), x, float("-inf"))
        highest, at = _better(highest, at, x, place)
    value, best = tl.reduce((highest, at), 0, _better)
    all_good = tl.min(good, 0)
    if SPLITS == 1:
        tl.store(tokens + row, best.to(tl.int64))
        tl.store(finite + row, all_good.to(tl.int64))
        if KEPT:
            tl.store(kept + tl.load(slots + row), best.to(tl.int64))
    else:
        tl.store(values + row * SPLITS + split, value)
        tl.store(ids + row * SPLITS + split, best)
        tl.store(sound + row * SPLITS + split, all_good)
        tl.debug_barrier()
        if tl.atomic_add(arrived + row, 1) == SPLITS - 1:
            parts = row * SPLITS + tl.arange(0, SPLITS)
            _, best = tl.reduce((tl.load(values + parts), tl.load(ids + parts)), 0, _better)
            tl.store(tokens + row, best.to(tl.int64))
            tl.store(finite + row, tl.min(tl.load(sound + parts), 0).to(tl.int64))
            tl.store(arrived + row, 0)
            if KEPT:
                tl.store(kept + tl.load(slots + row), best.to(tl.int64))


def look_at(
    logits_BV: Tensor,
    drawable: int,
    workspace: Workspace,
    keep: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """int64 [2, B]: the likeliest of the ids below ``drawable``, the first of equals, and whether
    all logits of the row are finite. Rows of ``logits_BV`` may lie apart. keep: places int64 [B]
    in a tensor, int64, that get the ids too."""
    rows, vocab = logits_BV.shape
    found_2B = torch.empty((2, rows), dtype=torch.int64, device=logits_BV.device)
    wanted = min(PROGRAMS // rows, -(-vocab // BLOCK), MOST_SPLITS)
    splits = 1 << max(wanted, 1).bit_length() - 1
    shape = (rows, splits)
    slots_B, kept = (found_2B, found_2B) if keep is None else keep
    values = torch.empty(shape, dtype=torch.float32, device=logits_BV.device)
    ids = torch.empty(shape, dtype=torch.int32, device=logits_BV.device)
    _look[(rows, splits)](
        logits_BV, found_2B[0], found_2B[1], slots_B, kept, values, ids, torch.empty_like(ids),
        workspace.arrived, logits_BV.stride(0), vocab, drawable, -(-vocab // splits), BLOCK=BLOCK,
        SPLITS=splits, KEPT=keep is not None, num_warps=4, **launch_options(logits_BV.device),
    )  # fmt: skip
    return found_2B
