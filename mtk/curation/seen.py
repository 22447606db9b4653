"""Which of many strings came before, at 8 bytes a string.

Strings are known by 64-bit digests: among a billion different ones the chance that any two
are taken for the same is 3 %, among a hundred million 0.03 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint64]


def digests(texts: Sequence[str]) -> Digests:
    """[N] the first 8 bytes of BLAKE2b of each text in UTF-8."""
    packed = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(packed, np.uint64)


class Seen:
    """Sorted runs of digests, of which neighbours of like size are merged: each digest is
    moved a logarithmic number of times, and a look-up searches a logarithmic number of runs."""

    def __init__(self) -> None:
        self._runs: list[Digests] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, found: Digests) -> npt.NDArray[np.bool_]:
        """[N] which of them are new: neither seen before nor earlier in ``found``."""
        new = np.zeros(len(found), np.bool_)
        values, first = np.unique(found, return_index=True)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, values), len(run) - 1)
            fresh = run[at] != values
            values, first = values[fresh], first[fresh]
        new[first] = True
        if len(values):
            self._runs.append(values)
        while len(self._runs) > 1 and 2 * len(self._runs[-1]) > len(self._runs[-2]):
            last = self._runs.pop()
            self._runs[-1] = np.union1d(self._runs[-1], last)
        return new
