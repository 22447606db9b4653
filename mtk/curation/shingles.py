"""Shingles of a text, their MinHash signature and exact Jaccard similarity, in NumPy.

A shingle is a run of ``width`` characters, or of words; it is known by a 64-bit hash. MinHash
follows Broder (1997), bands Indyk and Motwani (1998). The last shingle of a text counts, which
OpenWebText's tools leave out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Unit = Literal["chars", "words"]
Measure = Literal["union", "min", "max"]

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_WORD = re.compile(r"\w+")
BLOCK = 1 << 16  # shingles hashed at a time: with their hashes they stay in the cache


def shingle_hashes(text: str, width: int, unit: Unit) -> Hashes:
    """[S] a hash of every shingle in order, repeated ones repeated; none for a text that is
    shorter than one. Words are compared in lower case, without what stands between them."""
    if unit == "chars":
        symbols = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        units = symbols.astype(np.uint64)
    else:
        words = _WORD.findall(text.lower())
        packed = b"".join(hashlib.blake2b(w.encode(), digest_size=8).digest() for w in words)
        units = np.frombuffer(packed, np.uint64)
    count = max(0, len(units) - width + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(width):
        hashes *= _BASE
        hashes += units[offset : offset + count]
    return _mixed(hashes)


def _mixed(hashes: Hashes) -> Hashes:
    """Every bit of the result depends on every bit (the finish of SplitMix64)."""
    hashes ^= hashes >> np.uint64(30)
    hashes *= _MIX[0]
    hashes ^= hashes >> np.uint64(27)
    hashes *= _MIX[1]
    hashes ^= hashes >> np.uint64(31)
    return hashes


def similarity(first: Hashes, second: Hashes, measure: Measure = "union") -> float:
    """Shared shingles by those of both (Jaccard), of the smaller or of the larger set.

    The two are sorted and without repetition (np.unique).
    """
    if not len(first) or not len(second):
        return 0.0
    shared = len(np.intersect1d(first, second, assume_unique=True))
    if measure == "min":
        return shared / min(len(first), len(second))
    if measure == "max":
        return shared / max(len(first), len(second))
    return shared / (len(first) + len(second) - shared)


@dataclass(frozen=True)
class MinHash:
    """Signatures of ``bands * rows`` minima, handed out as one hash a band.

    A minimum is taken over odd multiples of the shingles' hashes modulo 2**64: a permutation of
    all hashes, which the top bits of well mixed ones make as good as random here (the error of
    the estimate is that of independent draws; a test measures it).
    """

    bands: int
    rows: int
    seed: int

    def multipliers(self) -> Hashes:
        """[bands * rows] odd numbers, those of the seed."""
        rng = np.random.Generator(np.random.PCG64(self.seed))
        drawn = rng.integers(0, 1 << 64, self.bands * self.rows, dtype=np.uint64)
        return drawn | np.uint64(1)

    def signatures(self, documents: Sequence[Hashes]) -> Hashes:
        """[N, bands * rows] the top 32 bits of the minima; all ones for an empty document."""
        multipliers = self.multipliers()
        out = np.full((len(documents), len(multipliers)), 0xFFFFFFFF, np.uint64)
        filled = [index for index, hashes in enumerate(documents) if len(hashes)]
        for block in _blocks(filled, documents):
            hashes = np.concatenate([documents[index] for index in block])
            lengths = [len(documents[index]) for index in block]
            starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]).astype(np.intp)
            product = np.empty_like(hashes)
            for column, multiplier in enumerate(multipliers):
                np.multiply(hashes, multiplier, out=product)
                out[block, column] = np.minimum.reduceat(product, starts) >> np.uint64(32)
        return out

    def band_hashes(self, signatures: Hashes) -> Hashes:
        """[N, bands] a hash of the rows of each band."""
        rows = signatures.reshape(len(signatures), self.bands, self.rows)
        hashes = np.zeros(rows.shape[:2], np.uint64)
        for row in range(self.rows):
            hashes *= _BASE
            hashes += rows[:, :, row]
        return _mixed(hashes)

    def chance(self, jaccard: float) -> float:
        """That two texts of this similarity meet in some band."""
        return 1.0 - (1.0 - jaccard**self.rows) ** self.bands


def _blocks(filled: list[int], documents: Sequence[Hashes]) -> list[list[int]]:
    blocks: list[list[int]] = []
    size = BLOCK
    for index in filled:
        if size + len(documents[index]) > BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(index)
        size += len(documents[index])
    return blocks
