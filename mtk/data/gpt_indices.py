"""Which tokens make up which sample: the three indices of Megatron-core's GPTDataset.

The documents of an epoch are shuffled and laid end to end; sample ``j`` is a window of
``S + e`` tokens that starts at token ``j * S`` of this stream (``e`` = 1: the last token is
only a label, and the first of the next sample); then the samples are shuffled.

Orders
------
``megatron``: bit for bit what Megatron-core does. All epochs are one stream shuffled at once,
except that a last epoch of which less than 80 % is needed stays apart. The order of all
samples therefore changes with the number of samples asked for.

``epochs``: every epoch is shuffled on its own. Epoch 0 draws from ``RandomState(seed)``,
epoch ``k`` from ``RandomState([seed, k])``: first the documents, then the samples. The
epochs' documents still form one stream, cut every ``S`` tokens, so no token is lost at a
seam; a sample belongs to the epoch in which its *last* token lies, and never leaves that
epoch's stretch of the order. Epoch ``k`` thus needs nothing that comes after it: a longer
training has the same beginning, token for token. One epoch equals ``megatron``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from mtk.data.shuffle import COMPILED_FROM, shuffle_in_place

Order = Literal["epochs", "megatron"]
IntArray = npt.NDArray[np.integer]
INT32_MAX = int(np.iinfo(np.int32).max)
UINT32_MAX = int(np.iinfo(np.uint32).max)
# Below this share of an epoch's samples, Megatron-core keeps the last epoch apart.
SEPARATE_BELOW = 0.80
# Samples worked on at a time: their intermediate numbers stay in the processor's cache (larger
# ones would be given back to the system and zeroed anew each time, which takes twice as long),
# and memory beyond the arrays themselves does not grow with them.
BLOCK = 1 << 14


@dataclass(frozen=True)
class IndexPlan:
    """How many samples there are, and in which stretches they are shuffled.

    bounds: samples [0, bounds[0]) are the first stretch, and so on; the last bound is the
    number of samples. stretches: epochs in each.
    """

    order: Order
    tokens_per_epoch: int
    sequence_length: int
    extra_token: int
    drop_last: bool
    stretches: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def epochs(self) -> int:
        return sum(self.stretches)

    @property
    def samples(self) -> int:
        return self.bounds[-1]


@dataclass(frozen=True)
class GPTIndices:
    """document: int32 (int64 if needed) [epochs * documents], sequence indices in order.
    sample: int32 (int64 if needed) [samples + 1, 2], position in ``document`` and offset.
    shuffle: uint32 (int64 if needed) [samples], from the order of training to ``sample``.
    """

    document: IntArray
    sample: IntArray
    shuffle: IntArray


def plan_indices(
    tokens_per_epoch: int,
    sequence_length: int,
    num_samples: int | None,
    *,
    order: Order,
    extra_token: int = 1,
    drop_last: bool = True,
) -> IndexPlan:
    """Epochs and samples for at least ``num_samples`` samples (None: one epoch).

    drop_last: leave out a last sample that is not full (for one epoch only; Megatron-core
    rounds the count in float32 there, this is exact).
    """
    if tokens_per_epoch < 1 or sequence_length < 1:
        raise ValueError("tokens_per_epoch and sequence_length must be at least 1")
    if not drop_last and num_samples is not None:
        raise ValueError("drop_last=False goes with num_samples=None")
    needed = 0 if num_samples is None else num_samples * sequence_length + extra_token
    epochs = max(1, -(-needed // tokens_per_epoch))

    def samples_in(count: int) -> int:
        available = count * tokens_per_epoch - extra_token
        return available // sequence_length if drop_last else -(-available // sequence_length)

    if order == "epochs":
        stretches = (1,) * epochs
    elif epochs > 1 and _last_epoch_apart(samples_in, epochs, num_samples or 0):
        stretches = (epochs - 1, 1)
    else:
        stretches = (epochs,)
    bounds = tuple(samples_in(int(count)) for count in np.cumsum(stretches))
    return IndexPlan(
        order, tokens_per_epoch, sequence_length, extra_token, drop_last, stretches, bounds
    )


def build_indices(
    sizes: npt.NDArray[np.int32],
    documents: IntArray,
    seed: int,
    plan: IndexPlan,
    compiled_from: int = COMPILED_FROM,
) -> GPTIndices:
    """The three indices. ``sizes``: tokens of every sequence of the dataset; ``documents``:
    the sequences of this split; ``compiled_from``: see :mod:`mtk.data.shuffle`. ``mtk bench
    index`` measures time and memory."""
    count = len(plan.stretches)
    if plan.order == "megatron":
        # One generator: the documents of all stretches come before the samples of any.
        states = [np.random.RandomState(seed)] * count
    else:
        states = [_epoch_state(seed, epoch) for epoch in range(count)]
    document = np.concatenate(
        [_shuffled_documents(documents, n, s) for n, s in zip(plan.stretches, states, strict=True)]
    )
    # Both take long for much data, wait for memory and let go of Python's lock.
    with ThreadPoolExecutor(1) as beside:
        sample = beside.submit(build_sample_index, sizes, document, plan)
        shuffle = _shuffled_samples(plan, states, compiled_from)
        return GPTIndices(document, sample.result(), shuffle)


def _shuffled_samples(
    plan: IndexPlan, states: Sequence[np.random.RandomState], compiled_from: int
) -> IntArray:
    dtype = np.dtype(np.uint32 if plan.samples < UINT32_MAX - 1 else np.int64)
    shuffle: IntArray = np.empty(plan.samples, dtype)
    for (begin, end), state in zip(pairwise((0, *plan.bounds)), states, strict=True):
        for first, last in _blocks(begin, end):
            shuffle[first:last] = np.arange(first, last)
        shuffle_in_place(shuffle[begin:end], state, compiled_from)
    return shuffle


def build_sample_index(
    sizes: npt.NDArray[np.int32], document_index: IntArray, plan: IndexPlan
) -> IntArray:
    """Where every sample begins; row ``j + 1`` is also where sample ``j`` ends.

    A row points into the document that holds the last token of the sample before it, which
    is why documents without tokens are never pointed at (but in row 0).
    """
    lengths = sizes[document_index]
    ends = np.cumsum(lengths, dtype=np.int64)
    extra, step = plan.extra_token, plan.sequence_length
    # Samples whose last token (number j * S + e - 1 for row j) lies before each document's end.
    full = min(plan.samples, (int(ends[-1]) - extra) // step)
    done = np.clip((ends - extra) // step, 0, full)
    largest = max(len(document_index), int(sizes.max(initial=0)))
    dtype = np.int32 if largest <= INT32_MAX else np.int64
    index = np.empty((plan.samples + 1, 2), dtype=dtype)
    index[0] = 0
    for begin, end in _blocks(1, full + 1):
        # Documents that rows of this block point into, and how many of its rows each has.
        low, high = np.searchsorted(done, [begin, end - 1]).tolist()
        counts = np.diff(done[low : high + 1].clip(max=end - 1), prepend=begin - 1)
        index[begin:end, 0] = np.repeat(np.arange(low, high + 1), counts)
        starts = ends[low : high + 1] - lengths[low : high + 1]
        index[begin:end, 1] = np.arange(begin, end) * step - np.repeat(starts, counts)
    if plan.samples > full:  # the one sample that is not full ends with the stream
        index[-1] = len(document_index) - 1, lengths[-1] - extra
    return index


def _blocks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for first in range(begin, end, BLOCK):
        yield first, min(first + BLOCK, end)


def _last_epoch_apart(samples_in: Callable[[int], int], epochs: int, num_samples: int) -> bool:
    from_last = num_samples - samples_in(epochs - 1)
    return from_last < int(SEPARATE_BELOW * samples_in(1))


def _epoch_state(seed: int, epoch: int) -> np.random.RandomState:
    return np.random.RandomState(seed if epoch == 0 else [seed, epoch])


def _shuffled_documents(documents: IntArray, epochs: int, state: np.random.RandomState) -> IntArray:
    dtype = np.int32 if int(documents.max(initial=0)) <= INT32_MAX else np.int64
    index = np.tile(documents.astype(dtype), epochs)
    shuffle_in_place(index, state)
    return index
