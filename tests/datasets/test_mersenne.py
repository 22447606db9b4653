"""The generators of the C++ standard library: golden values, and a loop beside the blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mtk.data.mersenne import BLOCK, mt19937, mt19937_64

DEFAULT_SEED = 5489


def test_the_standards_golden_values() -> None:
    # ISO C++, [rand.predef]: the 10000th consecutive invocation of a default-constructed one.
    assert int(next(mt19937(DEFAULT_SEED))[9999]) == 4123659995
    assert int(next(mt19937_64(DEFAULT_SEED))[9999]) == 9981545732273789042


def slow_64(seed: int) -> Iterator[int]:
    """One number at a time, as the algorithm is published."""
    mask = (1 << 64) - 1
    state = [seed & mask]
    for i in range(1, 312):
        state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & mask)
    at = 0
    while True:
        joined = (state[at] & ~0x7FFFFFFF & mask) | (state[(at + 1) % 312] & 0x7FFFFFFF)
        x = state[(at + 156) % 312] ^ (joined >> 1) ^ (0xB5026F5AA96619E9 if joined & 1 else 0)
        state[at], at = x, (at + 1) % 312
        x ^= (x >> 29) & 0x5555555555555555
        x ^= (x << 17) & 0x71D67FFFEDA60000
        x ^= (x << 37) & 0xFFF7EEE000000000
        yield (x ^ (x >> 43)) & mask


@pytest.mark.parametrize("seed", [0, 1, 1235, 2**32, 2**64 - 1])
def test_blocks_equal_the_loop(seed: int) -> None:
    blocks = mt19937_64(seed)
    found = np.concatenate([next(blocks), next(blocks)])
    wanted = slow_64(seed)
    assert len(found) > BLOCK
    assert found.tolist() == [next(wanted) for _ in range(len(found))]


def test_blocks_of_32_bits_go_on() -> None:
    blocks = mt19937(7)
    found = np.concatenate([next(blocks), next(blocks)])
    generator = np.random.MT19937()
    generator.state = np.random.RandomState(7).get_state(legacy=False)
    assert np.array_equal(found, generator.random_raw(len(found)))
