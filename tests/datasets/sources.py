"""Token sources in memory, and the simplest correct versions of the index algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class MemorySource:
    """Sequences in memory; every sequence is a document."""

    def __init__(self, sequences: Sequence[npt.NDArray[np.generic]]) -> None:
        self._sequences = list(sequences)
        self.sizes = np.array([len(s) for s in sequences], dtype=np.int32)
        self.document_indices = np.arange(len(sequences) + 1, dtype=np.int64)
        self.dtype: np.dtype[np.generic] = np.dtype(np.int64)

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.generic]:
        stop = None if length is None else offset + length
        return self._sequences[i][offset:stop]


def unique_source(lengths: Sequence[int]) -> MemorySource:
    """Sequences in which every token of the whole source is a different number."""
    ends = np.cumsum(lengths)
    return MemorySource(
        [np.arange(e - n, e, dtype=np.int64) for e, n in zip(ends, lengths, strict=True)]
    )


def random_lengths(rng: np.random.Generator, most: int = 30) -> npt.NDArray[np.int32]:
    """Up to 40 document lengths, some of them zero, at least two tokens in all."""
    lengths = rng.integers(0, most, size=int(rng.integers(1, 40)), dtype=np.int32)
    lengths[0] = max(2, lengths[0])
    return lengths


def naive_indices(
    lengths: npt.NDArray[np.int32],
    documents: npt.NDArray[np.int32],
    sequence_length: int,
    num_samples: int | None,
    seed: int,
    extra: int = 1,
    drop_last: bool = True,
) -> tuple[list[int], list[list[int]], list[int]]:
    """Megatron-core's algorithm as its reference describes it, token by token."""
    tokens = int(lengths[documents].sum())
    epochs = 1
    if num_samples is not None:
        while epochs * tokens < num_samples * sequence_length + extra:
            epochs += 1
    first = ((epochs - 1) * tokens - extra) // sequence_length
    per_epoch = (tokens - extra) // sequence_length
    separate = epochs > 1 and (num_samples or 0) - first < int(0.80 * per_epoch)
    state = np.random.RandomState(seed)
    document: list[int] = []
    for count in (epochs - 1, 1) if separate else (epochs,):
        block = np.tile(documents, count)
        state.shuffle(block)
        document += block.tolist()
    # Every token of the stream with the document position and offset it has.
    where = [(p, o) for p, d in enumerate(document) for o in range(int(lengths[d]))]
    rows, at = [[0, 0]], 0
    while at + sequence_length + extra <= len(where):
        at += sequence_length
        position, offset = where[at + extra - 1]
        rows.append([position, offset + 1 - extra])
    if not drop_last and at + extra < len(where):
        rows.append([len(document) - 1, int(lengths[document[-1]]) - extra])
    total = len(rows) - 1
    shuffle: list[int] = []
    for begin, end in ((0, first), (first, total)) if separate else ((0, total),):
        block = np.arange(begin, end)
        state.shuffle(block)
        shuffle += block.tolist()
    return document, rows, shuffle


def naive_blend(
    weights: Sequence[float], size: int, limits: Sequence[float] | None = None
) -> tuple[list[int], list[int]]:
    """The dataset that lags most behind its share is next; the first of them in a tie."""
    counts = [0] * len(weights)
    datasets, samples = [], []
    for s in range(size):
        best, most = -1, -np.inf
        for d, weight in enumerate(weights):
            lag = weight * max(float(s), 1.0) - counts[d]
            if (limits is None or counts[d] < limits[d]) and lag > most:
                best, most = d, lag
        datasets.append(best)
        samples.append(counts[best])
        counts[best] += 1
    return datasets, samples
