"""Where a text holds an n-gram of the evaluation sets.

Words are runs of ``\\w`` in lower case, as Megatron-LM's filter has them. A text of the
evaluation sets gives all its n-grams of the largest length; a shorter one that still has
enough words is an n-gram as a whole; one that is shorter yet gives none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WORDS, NGRAMS = "words.txt", "ngrams.npz"
_WORD = re.compile(r"\w+")
_BY_WORD = re.compile("[\u0130\u03a3]")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = 20  # of the hash, in a table that answers "surely not" for most places
Ids = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Hit:
    """An n-gram of the table in a text: from word ``word``, characters start to end."""

    ngram: int
    word: int
    start: int
    end: int


class NgramTable:
    """Different n-grams of the evaluation sets, numbered from 0: by length, then by hash.

    words: all that occur; a word's id is its place, from 1. lengths: of each block. Blocks
    hold [M] sorted hashes and [M, length] ids; the ids decide where hashes agree.
    """

    def __init__(self, words: list[str], blocks: dict[int, Ids]) -> None:
        self._ids = {word: index for index, word in enumerate(words, start=1)}
        self._words = words
        self._blocks: dict[int, tuple[Hashes, Ids]] = {}
        self._filters: dict[int, npt.NDArray[np.bool_]] = {}
        self._firsts: dict[int, int] = {}
        first = 0
        for length, ids in sorted(blocks.items()):
            hashes = _hashes(ids)
            order = np.argsort(hashes, kind="stable")
            self._blocks[length] = hashes[order], ids[order]
            self._filters[length] = np.zeros(1 << _FILTER_BITS, np.bool_)
            self._filters[length][_filter_places(hashes)] = True
            self._firsts[length] = first
            first += len(ids)
        self._size = first

    def __len__(self) -> int:
        return self._size

    @classmethod
    def build(cls, texts: Iterable[str], shortest: int, longest: int) -> NgramTable:
        """From the texts of evaluation sets."""
        ids: dict[str, int] = {}
        found: dict[int, list[Ids]] = {}
        for text in texts:
            words = [ids.setdefault(word, len(ids) + 1) for word in _lower_words(text)]
            length = min(longest, len(words))
            if length >= shortest:
                found.setdefault(length, []).append(_windows(np.array(words, np.uint32), length))
        blocks = {n: np.unique(np.concatenate(grams), axis=0) for n, grams in found.items()}
        return cls(list(ids), blocks)

    def save(self, folder: Path) -> None:
        (folder / WORDS).write_text("\n".join(self._words), encoding="utf-8")
        arrays: dict[str, Any] = {str(n): ids for n, (_, ids) in self._blocks.items()}
        np.savez(folder / NGRAMS, **arrays)

    @classmethod
    def load(cls, folder: Path) -> NgramTable:
        words = (folder / WORDS).read_text(encoding="utf-8").split("\n")
        with np.load(folder / NGRAMS) as arrays:
            return cls(words, {int(name): arrays[name] for name in arrays.files})

    def find(self, text: str) -> list[Hit]:
        """Every place of every n-gram, by its first word, longer ones first."""
        words = _lower_words(text)
        ids = np.fromiter(map(self._ids.get, words, repeat(0)), np.uint32, len(words))
        found = [
            (place, length, ngram)
            for length, hashes in _rolled(ids, max(self._blocks, default=0))
            if length in self._blocks
            for place, ngram in self._matches(ids, hashes, length)
        ]
        if not found:
            return []
        spans = [match.span() for match in _WORD.finditer(text)]
        found.sort(key=lambda item: (item[0], -item[1]))
        return [
            Hit(ngram, place, spans[place][0], spans[place + length - 1][1])
            for place, length, ngram in found
        ]

    def _matches(self, ids: Ids, hashes: Hashes, length: int) -> Iterator[tuple[int, int]]:
        """(word, n-gram) of every n-gram of one length."""
        # Nearly every place ends here.
        places = np.flatnonzero(self._filters[length][_filter_places(hashes)])
        known, grams = self._blocks[length]
        for place in places.tolist():
            at = int(np.searchsorted(known, hashes[place]))
            while at < len(known) and known[at] == hashes[place]:
                if np.array_equal(grams[at], ids[place : place + length]):
                    yield place, self._firsts[length] + at
                    break
                at += 1


def _lower_words(text: str) -> list[str]:
    """Each word in lower case. A whole text is lowered at once where that is the same: not with
    a dotted capital I, which becomes two characters, or a sigma, whose form its word decides."""
    if text.isascii() or not _BY_WORD.search(text):
        return _WORD.findall(text.lower())
    return [word.lower() for word in _WORD.findall(text)]


def _windows(ids: Ids, length: int) -> Ids:
    """[W - length + 1, length] every run of ``length`` words."""
    return np.lib.stride_tricks.sliding_window_view(ids, length)


def _hashes(grams: Ids) -> Hashes:
    """[M] of [M, length] ids."""
    hashes = np.zeros(len(grams), np.uint64)
    for column in range(grams.shape[1]):
        hashes = hashes * _BASE + grams[:, column].astype(np.uint64)
    return hashes


def _rolled(ids: Ids, longest: int) -> Iterator[tuple[int, Hashes]]:
    """(length, [W - length + 1] hash of every run of so many words) up to the longest."""
    hashes = np.zeros(len(ids), np.uint64)
    for length in range(1, min(longest, len(ids)) + 1):
        hashes = hashes[: len(ids) - length + 1] * _BASE + ids[length - 1 :]
        yield length, hashes


def _filter_places(hashes: Hashes) -> npt.NDArray[np.int64]:
    # The last id added decides the low bits; multiplied again, it reaches the high ones.
    places = (hashes * _BASE) >> np.uint64(64 - _FILTER_BITS)
    return places.astype(np.int64)
