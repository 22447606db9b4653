"""Tokens out of nothing: the generated dataset of Megatron-core, for trying things out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SEQUENCES = 100_000
LONGEST = 4096  # exclusive


class MockSource:
    """100,000 documents 1, 2, 3, ... modulo the vocabulary, each ended by ``eod``.

    Lengths are drawn from [1, 4096) with a fixed seed. Implements
    :class:`~mtk.data.token_source.TokenSource` in memory.
    """

    def __init__(self, vocab_size: int, eod: int) -> None:
        if not 0 <= eod < vocab_size:
            raise ValueError(f"eod {eod} is not in a vocabulary of {vocab_size}")
        self._vocab_size = vocab_size
        self._eod = eod
        rng = np.random.default_rng(0)
        self._sizes = rng.integers(1, LONGEST, size=SEQUENCES, dtype=np.int32)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.int64)

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        return self._sizes

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self) + 1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._sizes)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.generic]:
        size = int(self._sizes[i])
        stop = size if length is None else min(offset + length, size)
        ids = (np.arange(offset, stop, dtype=np.int64) + 1) % self._vocab_size
        if stop == size and len(ids):
            ids[-1] = self._eod
        return ids
