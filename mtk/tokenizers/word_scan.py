"""Texts cut into words that are looked up in a hash table, compiled by numba.

Everything is UTF-8 in one array of bytes, so that no Python object is made for a word. The
table is open addressing with linear probing: a slot holds the upper half of a word's hash
(FNV-1a, finished by a multiplication) and its number plus 1; a hit is compared byte by byte.
The rules of cutting are those of ``word_cache``, byte for byte.
"""

import numpy as np
from numba import njit, uint64

BLANK, ALPHANUMERIC, MARK, OTHER = 0, 1, 2, 3  # classes of bytes
# Where a scan stands: next byte, its text, byte in front of a word cut inside a word (or 0),
# how many words the table holds and bytes of them, how many words were found in this window.
PLACE, TEXT, BEFORE, WORDS, BYTES, FOUND, STATE = 0, 1, 2, 3, 4, 5, 6
LOW = uint64(0xFFFFFFFF)


def _compiled(function):
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder that may be written to keep it
        return njit(nogil=True)(function)


# A call would pass every field of eight arrays, once a word.
_inlined = njit(inline="always")


@_inlined
def _hash(data, start, end, before):
    code = uint64(0xCBF29CE484222325) if before == 0 else uint64(0x9AE16A3B2F90404F)
    for i in range(start, end):
        code = (code ^ uint64(data[i])) * uint64(0x100000001B3)
    return (code ^ (code >> uint64(29))) * uint64(0xBF58476D1CE4E5B9)


@_inlined
def _look_up(data, start, end, before, state, slots, starts, befores, arena, found, text_of):
    """The word's number to ``found``, as a new one if need be; False if there is no room."""
    size = end - start
    words, used = state[WORDS], state[BYTES]
    if state[FOUND] == len(found) or words == len(befores) or used + size > len(arena):
        return False
    code = _hash(data, start, end, before)
    upper, mask = code >> uint64(32), uint64(len(slots) - 1)
    slot = code & mask
    while True:
        entry = slots[slot]
        if entry == 0:
            break
        if entry >> uint64(32) == upper:
            word = np.int64(entry & LOW) - 1
            first = starts[word]
            if starts[word + 1] - first == size and (befores[word] == 0) == (before == 0):
                same = True
                for i in range(size):
                    if arena[first + i] != data[start + i]:
                        same = False
                        break
                if same:
                    found[state[FOUND]], text_of[state[FOUND]] = word, state[TEXT]
                    state[FOUND] += 1
                    return True
        slot = (slot + uint64(1)) & mask
    slots[slot] = (upper << uint64(32)) | uint64(words + 1)
    for i in range(size):
        arena[used + i] = data[start + i]
    starts[words + 1], befores[words] = used + size, before
    found[state[FOUND]], text_of[state[FOUND]] = words, state[TEXT]
    state[WORDS], state[BYTES] = words + 1, used + size
    state[FOUND] += 1
    return True


@_compiled
def scan_wordpiece(data, ends, classes, state, table, found, text_of):
    """On from ``state`` until the texts end (True) or there is no room (False): runs of letters
    and digits and single marks; words with bytes of another class stay whole.

    data: uint8. ends: int64, of every text. classes: uint8 [256]. table: slots uint64 [a power
    of two], starts int64 [words + 1], befores uint8 [words], arena uint8 [bytes].
    """
    slots, starts, befores, arena = table
    simple_to = np.int64(-1)
    place = state[PLACE]
    while state[TEXT] < len(ends):
        stop = ends[state[TEXT]]
        while place < stop and classes[data[place]] == BLANK:
            place += 1
        if place == stop:
            state[TEXT] += 1
            continue
        end = place + 1
        if place >= simple_to:
            simple = True
            end = place
            while end < stop and classes[data[end]] != BLANK:
                simple = simple and classes[data[end]] != OTHER
                end += 1
            if simple:
                simple_to = end
                end = place + 1
        if place < simple_to and classes[data[place]] == ALPHANUMERIC:
            while end < simple_to and classes[data[end]] == ALPHANUMERIC:
                end += 1
        state[PLACE] = place
        if not _look_up(data, place, end, 0, state, slots, starts, befores, arena, found, text_of):
            return False
        place = end
        state[PLACE] = place
    return True


@_compiled
def scan_pieces(data, ends, blanks, printable, cuts, state, table, found, text_of):
    """As :func:`scan_wordpiece`, for SentencePiece: cut at ``blanks`` (of several only if tab
    is one) between ``printable`` bytes, and between two bytes where ``cuts`` [256 * 256] says
    so; the latter words remember the byte in front of them."""
    slots, starts, befores, arena = table
    many = blanks[9]
    while state[TEXT] < len(ends):
        stop = ends[state[TEXT]]
        start = state[PLACE]
        end, following, before = stop, stop, np.int64(0)
        i = start + 1
        while i < stop:
            last = np.int64(data[i - 1])
            this = np.int64(data[i])
            if cuts[last * 256 + this]:
                end, following, before = i, i, last
                break
            if blanks[this] and printable[last]:
                after = i + 1
                while many and after < stop and blanks[data[after]]:
                    after += 1
                if after < stop and printable[data[after]]:
                    end, following = i, after
                    break
            i += 1
        if not _look_up(
            data, start, end, state[BEFORE], state, slots, starts, befores, arena, found, text_of
        ):
            return False
        state[PLACE], state[BEFORE] = following, before
        if end == stop:
            state[TEXT] += 1
    return True


@_compiled
def refill(words, table):
    """Enter all words into empty slots, more than there were."""
    slots, starts, befores, arena = table
    mask = uint64(len(slots) - 1)
    for word in range(words):
        code = _hash(arena, starts[word], starts[word + 1], befores[word])
        slot = code & mask
        while slots[slot] != 0:
            slot = (slot + uint64(1)) & mask
        slots[slot] = (code & ~LOW) | uint64(word + 1)


@_compiled
def count(found, id_starts):
    """How many ids the words ``found`` have."""
    total = np.int64(0)
    for k in range(len(found)):
        total += id_starts[found[k] + 1] - id_starts[found[k]]
    return total


@_compiled
def gather(found, text_of, ids, id_starts, out, lengths):
    """The ids of the words ``found`` one after another to ``out``; adds to ``lengths``."""
    place = 0
    for k in range(len(found)):
        word = found[k]
        first, last = id_starts[word], id_starts[word + 1]
        for i in range(first, last):
            out[place] = ids[i]
            place += 1
        lengths[text_of[k]] += last - first
