"""The Mersenne Twisters of the C++ standard library, number for number.

``std::mt19937`` (Matsumoto & Nishimura 1998) is numpy's generator too, so its raw outputs come
from there. ``std::mt19937_64`` (Nishimura 2000) numpy has not; here a whole state is twisted
at once, so that ten million numbers take about half a second.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16  # numbers that are drawn at a time

STATE = 312
MIDDLE = 156
MATRIX = np.uint64(0xB5026F5AA96619E9)
LOW_31 = np.uint64(0x7FFFFFFF)
ONE = np.uint64(1)
# Shift to the right (or left) and mask of each step of tempering, in order.
TEMPERING = (
    (29, 0x5555555555555555),
    (-17, 0x71D67FFFEDA60000),
    (-37, 0xFFF7EEE000000000),
    (43, 0xFFFFFFFFFFFFFFFF),
)
SEED_FACTOR = 6364136223846793005


def mt19937(seed: int) -> Iterator[npt.NDArray[np.uint32]]:
    """The outputs of ``std::mt19937(seed)`` in blocks, without end. seed: 0..2^32 - 1."""
    state = np.random.RandomState(seed)
    while True:
        # The full range needs neither rejection nor masks: these are the raw outputs.
        yield state.randint(0, 1 << 32, size=BLOCK, dtype=np.uint32)


def mt19937_64(seed: int) -> Iterator[npt.NDArray[np.uint64]]:
    """The outputs of ``std::mt19937_64(seed)`` in blocks, without end. seed: 0..2^64 - 1."""
    state = _seeded(seed)
    while True:
        states = np.empty((BLOCK // STATE, STATE), dtype=np.uint64)
        for row in states:
            _twist(state)
            row[:] = state
        yield _tempered(states.reshape(-1))


def _seeded(seed: int) -> npt.NDArray[np.uint64]:
    values = [seed]
    for i in range(1, STATE):
        last = values[-1]
        values.append((SEED_FACTOR * (last ^ (last >> 62)) + i) % (1 << 64))
    return np.array(values, dtype=np.uint64)


def _twist(state: npt.NDArray[np.uint64]) -> None:
    """The next state in place. Each half needs the other, the last number also the first."""
    first = _mixed(state[:MIDDLE], state[1 : MIDDLE + 1]) ^ state[MIDDLE:]
    last = _mixed(state[MIDDLE:-1], state[MIDDLE + 1 :]) ^ first[:-1]
    end = _mixed(state[-1:], first[:1]) ^ first[-1:]
    state[:MIDDLE] = first
    state[MIDDLE:-1] = last
    state[-1:] = end


def _mixed(upper: npt.NDArray[np.uint64], lower: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    joined = (upper & ~LOW_31) | (lower & LOW_31)
    return (joined >> ONE) ^ ((joined & ONE) * MATRIX)


def _tempered(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    for shift, mask in TEMPERING:
        moved = values >> np.uint64(shift) if shift > 0 else values << np.uint64(-shift)
        values = values ^ (moved & np.uint64(mask))
    return values
