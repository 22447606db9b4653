"""The ids of a corpus's words, remembered in arrays that compiled code reads and fills.

``word_cache`` in other words: the same cuts, the same ids, without a Python object a word. A
window of words is looked up, those that are new go through the tokenizer in one batch, and the
ids are gathered. Needs numba.

SentencePiece words are also cut inside, between two characters that no piece of the vocabulary
holds side by side: BPE joins neighbours only to pieces, so that nothing ever grows over such a
place. What stands behind it is encoded behind the character in front of it, whose own ids
are taken away again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.errors import DataError
from mtk.tokenizers import word_scan as scan
from mtk.tokenizers.flat import Flat
from mtk.tokenizers.word_cache import CACHE_BYTES, NAME

WINDOW = 1 << 18  # words looked up at a time
FIRST_WORDS = 1 << 16  # room that a table begins with
FIRST_BYTES = 1 << 20
SLOTS = 4  # a word

Encode = Callable[[Sequence[str]], list[list[int]]]
Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WordPieceCuts:
    """classes: [256], see ``word_scan``."""

    classes: Bytes

    def scan(self, data: Bytes, ends: Numbers, *work: Any) -> bool:
        return bool(scan.scan_wordpiece(data, ends, self.classes, *work))


@dataclass(frozen=True)
class PieceCuts:
    """blanks, printable: bool [256]. inside: bool [256 * 256], by the bytes on both sides."""

    blanks: npt.NDArray[np.bool_]
    printable: npt.NDArray[np.bool_]
    inside: npt.NDArray[np.bool_]

    def scan(self, data: Bytes, ends: Numbers, *work: Any) -> bool:
        return bool(scan.scan_pieces(data, ends, self.blanks, self.printable, self.inside, *work))


def wordpiece_cuts() -> WordPieceCuts:
    """Blanks, letters and digits, punctuation of ASCII; control characters and all else whole."""
    classes = np.full(256, scan.OTHER, np.uint8)
    for byte in range(0x21, 0x7F):
        classes[byte] = scan.ALPHANUMERIC if chr(byte).isalnum() else scan.MARK
    classes[list(b" \t\n\r")] = scan.BLANK
    return WordPieceCuts(classes)


def piece_cuts(pieces: Sequence[str], blanks: bytes, unchanged: Sequence[str]) -> PieceCuts:
    """pieces: of the vocabulary. unchanged: printable characters of ASCII that the model's
    normalization leaves alone wherever they stand; only between these a word is cut inside."""
    printable = np.zeros(256, np.bool_)
    printable[0x21:0x7F] = True
    known = set(pieces)
    safe = [ord(character) for character in unchanged if character in known]
    inside = np.zeros((256, 256), np.bool_)
    inside[np.ix_(safe, safe)] = True
    for first, second in chain.from_iterable(map(pairwise, known)):
        if first.isascii() and second.isascii():
            inside[ord(first), ord(second)] = False
    is_blank = np.zeros(256, np.bool_)
    is_blank[list(blanks)] = True
    return PieceCuts(is_blank, printable, inside.reshape(-1))


class WordTable:
    """An encoder of texts. encode: the tokenizer's ``encode_batch``."""

    name = NAME

    def __init__(
        self, encode: Encode, cuts: WordPieceCuts | PieceCuts, limit: int = CACHE_BYTES
    ) -> None:
        self._encode, self._cuts, self._limit = encode, cuts, limit
        self._found = np.empty(WINDOW, np.int32)
        self._text_of = np.empty(WINDOW, np.int32)
        self._state = np.zeros(scan.STATE, np.int64)
        self._forget()

    def __len__(self) -> int:
        return int(self._state[scan.WORDS])

    def encode(self, texts: Sequence[str]) -> Flat:
        """Raises DataError for lone surrogates."""
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise DataError("the text holds a lone surrogate, so it is not Unicode") from error
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        data = np.frombuffer(b"".join(encoded), np.uint8)
        lengths = np.zeros(len(texts), np.int64)
        self._state[[scan.PLACE, scan.TEXT, scan.BEFORE]] = 0
        parts: list[npt.NDArray[np.uint32]] = []
        finished = False
        while not finished:
            # Not while room is made for a word that is itself beyond the limit.
            if self._size() > self._limit and self._state[scan.FOUND]:
                self._forget()
            finished = self._window(data, ends, parts, lengths)
        return np.concatenate(parts) if len(parts) > 1 else parts[0], lengths

    def _window(
        self, data: Bytes, ends: Numbers, parts: list[npt.NDArray[np.uint32]], lengths: Numbers
    ) -> bool:
        """The next words; whether they were the last ones."""
        known, state = len(self), self._state
        state[scan.FOUND] = 0
        table = (self._slots, self._starts, self._befores, self._arena)
        finished = self._cuts.scan(data, ends, state, table, self._found, self._text_of)
        if len(self) > known:
            try:
                self._learn(known)
            except BaseException:
                self._forget()  # else there were words without ids
                raise
        found = self._found[: state[scan.FOUND]]
        part = np.empty(scan.count(found, self._id_starts), np.uint32)
        scan.gather(found, self._text_of, self._ids, self._id_starts, part, lengths)
        parts.append(part)
        if not finished:
            self._make_room()
        return finished

    def _learn(self, known: int) -> None:
        """The ids of all words from number ``known`` on."""
        places = self._starts[known : len(self) + 1].tolist()
        raw = self._arena[places[0] : places[-1]].tobytes()
        befores = self._befores[known : len(self)].tolist()
        words = [
            raw[first - places[0] : last - places[0]].decode() for first, last in pairwise(places)
        ]
        if any(befores):
            words = [chr(b) + word if b else word for b, word in zip(befores, words, strict=True)]
        found = self._encode(words)
        if any(befores):
            found = [ids[self._lead(b) :] for b, ids in zip(befores, found, strict=True)]
        sizes = np.fromiter(map(len, found), np.int64, len(found))
        start = int(self._id_starts[known])
        ends = start + np.cumsum(sizes)
        self._ids = _with_room(self._ids, start, int(ends[-1]))
        self._ids[start : ends[-1]] = np.fromiter(
            chain.from_iterable(found), np.uint32, int(ends[-1]) - start
        )
        self._id_starts[known + 1 : len(self) + 1] = ends

    def _lead(self, before: int) -> int:
        """How many ids the character in front of a word has."""
        if not before:
            return 0
        if before not in self._leads:
            self._leads[before] = len(self._encode([chr(before)])[0])
        return self._leads[before]

    def _make_room(self) -> None:
        """For more words or more bytes, whatever was missing (repeatedly for a long word)."""
        words, used = len(self), int(self._state[scan.BYTES])
        if self._state[scan.FOUND] == len(self._found):
            return
        if words == len(self._befores):
            self._befores = _with_room(self._befores, words, 2 * words)
            self._starts = _with_room(self._starts, words + 1, 2 * words + 1)
            self._id_starts = _with_room(self._id_starts, words + 1, 2 * words + 1)
            self._slots = np.zeros(SLOTS * len(self._befores), np.uint64)
            scan.refill(words, (self._slots, self._starts, self._befores, self._arena))
            return
        self._arena = _with_room(self._arena, used, 2 * len(self._arena))

    # Room for all that is remembered; what the entries are, says ``word_scan``.
    _slots: npt.NDArray[np.uint64]
    _starts: Numbers
    _befores: Bytes
    _arena: Bytes
    _ids: npt.NDArray[np.uint32]
    _id_starts: Numbers
    _leads: dict[int, int]

    def _size(self) -> int:
        arrays = (self._slots, self._starts, self._befores, self._arena)
        return sum(array.nbytes for array in (*arrays, self._ids, self._id_starts))

    def _forget(self) -> None:
        self._state[[scan.WORDS, scan.BYTES]] = 0
        self._slots = np.zeros(SLOTS * FIRST_WORDS, np.uint64)
        self._befores = np.empty(FIRST_WORDS, np.uint8)
        self._starts = np.zeros(FIRST_WORDS + 1, np.int64)
        self._id_starts = np.zeros(FIRST_WORDS + 1, np.int64)
        self._arena = np.empty(FIRST_BYTES, np.uint8)
        self._ids = np.empty(FIRST_BYTES, np.uint32)
        self._leads = {}


def _with_room(array: npt.NDArray[Any], used: int, size: int) -> npt.NDArray[Any]:
    """``array`` with its first ``used`` entries kept and room for ``size``, or twice as much
    as it had, for what is small is asked for again and again."""
    if size <= len(array):
        return array
    larger = np.empty(max(size, 2 * len(array)), array.dtype)
    larger[:used] = array[:used]
    return larger
