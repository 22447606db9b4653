"""Which dataset of a blend gives the next sample, bit for bit as in Megatron-core.

At sample ``s`` every dataset ``d`` lags behind its share by ``w_d * max(s, 1) - count_d``
samples (float64); the one that lags most is next, the first of them in a tie. There is no
randomness, and the beginning does not depend on how many samples are drawn.

The rule is sequential, so that a plain loop takes minutes for large blends. Here the samples
are cut into lanes that numpy advances together, one sample of every lane at a time. A lane
must know the counts at its beginning: it guesses them (each dataset has had its share), and
any lane that did not begin where the one before it ended is run again from there, until all
agree. The first lane is right, so what all agree on is exactly what the loop would give. Large
blends of many datasets take the loop itself, compiled, where numba is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.data.shuffle import numba_exists

MOST_DATASETS = int(np.iinfo(np.int16).max)
# Lanes are at least this long: shorter ones would spend their time on wrong guesses.
SHORTEST_LANE = 64
# Datasets times samples; compiling takes as long as lanes need for so many.
COMPILED_FROM = 1_000_000_000


@dataclass(frozen=True)
class BlendIndices:
    """dataset: int16 [size], which dataset; sample: int64 [size], which sample of it."""

    dataset: npt.NDArray[np.int16]
    sample: npt.NDArray[np.int64]

    def counts(self, datasets: int) -> npt.NDArray[np.int64]:
        """Samples drawn from each of ``datasets`` datasets."""
        return np.bincount(self.dataset, minlength=datasets).astype(np.int64)


def blending_indices(weights: npt.NDArray[np.float64], size: int) -> BlendIndices:
    """``size`` samples in proportion to ``weights``, which sum to 1."""
    limits = np.full(len(weights), np.iinfo(np.int64).max, dtype=np.int64)
    return _indices(weights, limits, size)


def exhaustive_blending_indices(sizes: npt.NDArray[np.int64]) -> BlendIndices:
    """Every sample of datasets of these ``sizes`` once; a dataset drops out when it is spent."""
    total = int(sizes.sum())
    return _indices(sizes / np.float64(total), sizes, total)


def _indices(
    weights: npt.NDArray[np.float64], limits: npt.NDArray[np.int64], size: int
) -> BlendIndices:
    compiled = len(weights) * size >= COMPILED_FROM and numba_exists()
    dataset = (_compiled_picks if compiled else _picks)(weights, limits, size)
    counts = np.bincount(dataset, minlength=len(weights))
    sample = np.empty(size, dtype=np.int64)
    order = np.argsort(dataset, kind="stable")
    begins = np.repeat(np.cumsum(counts) - counts, counts)
    sample[order] = np.arange(size, dtype=np.int64) - begins
    return BlendIndices(dataset, sample)


def _compiled_picks(
    weights: npt.NDArray[np.float64], limits: npt.NDArray[np.int64], size: int
) -> npt.NDArray[np.int16]:
    picks = np.empty(size, dtype=np.int16)
    _compiled()(weights, limits, picks)
    return picks


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from mtk.kernels.blend import pick

    return pick


def _picks(
    weights: npt.NDArray[np.float64], limits: npt.NDArray[np.int64], size: int
) -> npt.NDArray[np.int16]:
    length = max(SHORTEST_LANE, math.isqrt(max(size, 1)))
    lanes = max(1, -(-size // length))
    begins = np.arange(lanes, dtype=np.int64) * length
    states = np.stack([_guess(weights, limits, int(begin)) for begin in begins])
    ends = np.empty_like(states)
    picks = np.empty((lanes, length), dtype=np.int16)
    stale = np.arange(lanes)
    while len(stale):
        ends[stale], picks[stale] = _run(weights, limits, begins[stale], states[stale], length)
        wrong = np.any(states[1:] != ends[:-1], axis=1)
        stale = 1 + np.flatnonzero(wrong)
        states[stale] = ends[stale - 1]
    return picks.reshape(-1)[:size]


def _guess(
    weights: npt.NDArray[np.float64], limits: npt.NDArray[np.int64], time: int
) -> npt.NDArray[np.float64]:
    """Counts that sum to ``time``, as near to everybody's share as whole numbers can be."""
    shares = weights * time
    counts = np.minimum(np.floor(shares), limits)
    lacking = time - int(counts.sum())
    if lacking > 0:
        counts[np.argsort(counts - shares, kind="stable")[:lacking]] += 1
    return counts


def _run(
    weights: npt.NDArray[np.float64],
    limits: npt.NDArray[np.int64],
    begins: npt.NDArray[np.int64],
    states: npt.NDArray[np.float64],
    length: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int16]]:
    """Advance lanes by ``length`` samples: counts at their ends, and what they picked."""
    counts = states.copy()
    picks = np.empty((length, len(begins)), dtype=np.int16)
    rows = np.arange(len(begins))
    lag = np.empty_like(counts)
    finite = bool(np.any(limits < np.iinfo(np.int64).max))
    for step in range(length):
        time = np.maximum(begins + step, 1).astype(np.float64)
        np.multiply(weights, time[:, None], out=lag)
        lag -= counts
        if finite:
            lag[counts >= limits] = -np.inf
        pick = lag.argmax(axis=1)
        picks[step] = pick
        counts[rows, pick] += 1.0
    return counts, picks.T
