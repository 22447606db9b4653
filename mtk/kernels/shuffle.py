"""The shuffle of numpy's ``RandomState`` compiled by numba.

Fisher-Yates from the end: place ``i`` changes with a place drawn from 0..i. A draw takes an
output of MT19937 (Matsumoto & Nishimura 1998), keeps as many bits as ``i`` has, and is repeated
while the rest is larger than ``i``. numpy promises to keep to this for ``RandomState``.
"""

import numpy as np
from numba import njit, uint32

WORDS = 624
MIDDLE = 397
DRAWN = 4096  # places drawn before any are exchanged


@njit(nogil=True)
def _word(key, i, following, distant):
    joined = (key[i] & uint32(0x80000000)) | (key[following] & uint32(0x7FFFFFFF))
    odd = uint32(0x9908B0DF) if joined & uint32(1) else uint32(0)
    key[i] = key[distant] ^ (joined >> uint32(1)) ^ odd


@njit(nogil=True)
def _twist(key):
    """The next state, in place."""
    for i in range(WORDS - MIDDLE):
        _word(key, i, i + 1, i + MIDDLE)
    for i in range(WORDS - MIDDLE, WORDS - 1):
        _word(key, i, i + 1, i + MIDDLE - WORDS)
    _word(key, WORDS - 1, 0, MIDDLE - 1)


@njit(nogil=True)
def _tempered(y):
    y ^= y >> uint32(11)
    y ^= (y << uint32(7)) & uint32(0x9D2C5680)
    y ^= (y << uint32(15)) & uint32(0xEFC60000)
    return y ^ (y >> uint32(18))


@njit(nogil=True)
def shuffle(values, key, position):
    """Shuffle ``values`` [at most 2^32] in place; returns the next ``position``.

    key: uint32 [624], position: 0..624, the state of the generator; ``key`` changes in place.
    """
    places = np.empty(DRAWN, np.int64)
    i = len(values) - 1
    while i > 0:
        mask = uint32(i)
        for shift in (1, 2, 4, 8, 16):
            mask |= mask >> uint32(shift)
        # As long as ``bound`` stays above, it has as many bits as ``i``.
        fewer_bits = np.int64(mask >> uint32(1))
        bound, drawn = i, 0
        while drawn < DRAWN and bound > fewer_bits:
            if position == WORDS:
                _twist(key)
                position = 0
            # No more outputs than there is room for, even if none is refused.
            stop = min(WORDS, position + DRAWN - drawn)
            while position < stop and bound > fewer_bits:
                place = np.int64(_tempered(key[position]) & mask)
                position += 1
                # Without a branch, which would be guessed wrong every third time.
                places[drawn] = place
                taken = int(place <= bound)
                drawn += taken
                bound -= taken
        for n in range(drawn):
            j = places[n]
            values[i], values[j] = values[j], values[i]
            i -= 1
    return position
