"""Cross-entropy and its gradient in one visit to the logits.

A row of logits is read once from memory for its maximum and sum and, while it is still in the
second-level cache, again to be overwritten by its gradient. PyTorch's own way (log-softmax, loss,
backward) moves three to ten times as many bytes. Needs Triton.

Shape suffixes: N tokens, V columns of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program a row. Of blocks of 2,048 to 16,384 and 4 to 32 warps the fastest on an H200.
BLOCK = 2048
WARPS = 8
# Below any logit; a number, as -inf less -inf is none.
LEAST = tl.constexpr(-1e30)
# The label of tokens that have no loss, as in PyTorch.
IGNORED = tl.constexpr(-100)


@triton.jit
def _highest_and_sum(start, columns: tl.constexpr, used: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row: its maximum, and the sum of exp(x - maximum)."""
    offsets = tl.arange(0, BLOCK)
    # Every lane keeps a maximum and a sum of its own; they meet once, after the loop.
    top = tl.full((BLOCK,), LEAST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, columns, BLOCK):
        at = begin + offsets
        x = tl.load(start + at, mask=at < used, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def _subtract(
    start, label, log_sum, columns: tl.constexpr, used: tl.constexpr, BLOCK: tl.constexpr
):
    """A row becomes exp(x - log_sum), less 1 at the label if it is one of the columns used."""
    offsets = tl.arange(0, BLOCK)
    for begin in range(0, columns, BLOCK):
        at = begin + offsets
        x = tl.load(start + at, mask=at < used, other=float("-inf")).to(tl.float32)
        own = (at == label) & (at < used)
        gradient = tl.exp(x - log_sum) - tl.where(own, 1.0, 0.0)
        tl.store(start + at, gradient.to(start.dtype.element_ty), mask=at < columns)


@triton.jit
def _softmax_minus_target(
    logits, labels, losses, columns: tl.constexpr, used: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * columns
    label = tl.load(labels + row)
    # A label outside of the row must not be read there.
    own = (label >= 0) & (label < used)
    target = tl.load(start + label, mask=own, other=float("nan")).to(tl.float32)
    highest, total = _highest_and_sum(start, columns, used, BLOCK)
    log_sum = highest + tl.log(total)
    tl.store(losses + row, tl.where(label == IGNORED, 0.0, log_sum - target))
    # Then the gradient is exp(x - inf) = 0.
    log_sum = tl.where(label == IGNORED, float("inf"), log_sum)
    # No store may overtake a load of the row by another thread.
    tl.debug_barrier()
    _subtract(start, label, log_sum, columns, used, BLOCK)


@triton.jit
def _row_statistics(
    logits,
    labels,
    highest,
    total,
    target,
    columns: tl.constexpr,
    used: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * columns
    label = tl.load(labels + row)
    own = (label >= 0) & (label < used)
    tl.store(target + row, tl.load(start + label, mask=own, other=0.0).to(tl.float32))
    most, sum_of_all = _highest_and_sum(start, columns, used, BLOCK)
    tl.store(highest + row, most)
    tl.store(total + row, sum_of_all)


@triton.jit
def _subtract_rows(
    logits, labels, log_sums, columns: tl.constexpr, used: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * columns
    label, log_sum = tl.load(labels + row), tl.load(log_sums + row)
    _subtract(start, label, log_sum, columns, used, BLOCK)


def softmax_minus_target_(logits_NV: Tensor, labels_N: Tensor, used: int) -> Tensor:
    """Losses in nats, fp32 [N]; ``logits_NV`` (contiguous) becomes softmax - one-hot of the
    label, the gradient of each row's loss. Columns from ``used`` on take no part: they become 0.
    Labels as for :func:`mtk.models.linear_loss.linear_losses`.
    """
    losses_N = _floats(logits_NV)
    _launch(_softmax_minus_target, logits_NV, used, labels_N, losses_N)
    return losses_N


def row_statistics(logits_NV: Tensor, labels_N: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row fp32 [N]: its maximum, the sum of exp(x - maximum), and the label's logit, 0
    for labels that lie outside of 0..used - 1."""
    found = tuple(_floats(logits_NV) for _ in range(3))
    _launch(_row_statistics, logits_NV, used, labels_N, *found)
    return found[0], found[1], found[2]


def subtract_(logits_NV: Tensor, labels_N: Tensor, log_sums_N: Tensor, used: int) -> None:
    """``logits_NV`` becomes exp(x - log_sum), less 1 at the label if it lies in the row."""
    _launch(_subtract_rows, logits_NV, used, labels_N, log_sums_N)


def _floats(logits_NV: Tensor) -> Tensor:
    return torch.empty(logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)


def _launch(kernel: Any, logits_NV: Tensor, used: int, *vectors_N: Tensor) -> None:
    rows, columns = logits_NV.shape
    if rows and columns:
        block = min(BLOCK, triton.next_power_of_2(columns))
        kernel[(rows,)](logits_NV, *vectors_N, columns, used, BLOCK=block, num_warps=WARPS)
