"""Ids by looking words up: a corpus repeats its words, so most need no tokenizer twice.

Exact because a text is cut only where the tokenizer's result cannot reach across: the ids of
the pieces, one after another, are those of the whole.

* WordPiece: at blanks, tabs and line ends, which every BERT splitter drops; in ASCII also
  around every punctuation mark, which it sets apart.
* SentencePiece BPE: at a single space between two printable ASCII characters (at all blanks,
  where the model takes them for one space), if no piece of the vocabulary goes on over a space
  and every text begins with a space of the model's own.
  (Not for unigram models: sums of scores round differently in a longer text.)
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from mtk.tokenizers.base import Tokenizer
from mtk.tokenizers.flat import Flat, FlatEncoder

NAME = "words"
CACHE_BYTES = 160 << 20  # about what the remembered words may take
WORD_COST = 200  # bytes a word takes beside its characters: two objects, a slot of the table
BLANKS = (" ", "\t", "\n", "\r", "  ", "\r\n", " \t\n\r ")
COMPILED_FROM = 4 << 20  # characters from which on compiled code is worth its loading
# Names of normalizations that SentencePiece brings: none joins two characters of ASCII.
KNOWN_RULES = frozenset([b"nmt_nfkc", b"nfkc", b"nmt_nfkc_cf", b"nfkc_cf", b"identity"])
SPACE = "\u2581"  # how SentencePiece spells it

_PARTS = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")  # blanks between them are dropped
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SINGLE_SPACE = re.compile(r"(?<=[!-~]) (?=[!-~])")
_BLANKS = re.compile(r"(?<=[!-~])[ \t\n\r]+(?=[!-~])")

Encode = Callable[[Sequence[str]], list[list[int]]]


class WordCache:
    """word -> its ids as bytes of uint32; forgets everything when it has grown too large."""

    def __init__(self, encode: Encode, limit: int = CACHE_BYTES) -> None:
        self._encode, self._limit = encode, limit
        self._known: dict[str, bytes] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._known)

    def look_up(self, texts: Sequence[Sequence[str]]) -> list[bytes]:
        """The ids of each text, given as its words."""
        if self._size > self._limit:
            self.forget()
        self.learn(set().union(*texts))
        return [b"".join(map(self._known.__getitem__, words)) for words in texts]

    def forget(self) -> None:
        self._known.clear()
        self._size = 0

    def learn(self, words: Iterable[str]) -> None:
        new = [word for word in words if word not in self._known]
        for word, ids in zip(new, self._new_ids(new), strict=True):
            self._known[word] = ids
            self._size += WORD_COST + len(word) + len(ids)

    def _new_ids(self, words: list[str]) -> Iterable[bytes]:
        if not words:
            return []
        return (array("I", ids).tobytes() for ids in self._encode(words))


class WordCacheEncoder:
    """cut: a text to its words. compiled: makes an encoder with the same ids that is worth
    loading for more than ``COMPILED_FROM`` characters, if numba is installed."""

    name = NAME

    def __init__(
        self,
        cut: Callable[[str], Sequence[str]],
        cache: WordCache,
        compiled: Callable[[], FlatEncoder],
    ) -> None:
        self._cut, self._cache, self._compiled = cut, cache, compiled
        self._table: FlatEncoder | None = None
        self._left = COMPILED_FROM if numba_is_installed() else None

    def encode(self, texts: Sequence[str]) -> Flat:
        if self._table is not None:
            return self._table.encode(texts)
        if self._left is not None:
            self._left -= sum(map(len, texts))
            if self._left < 0:
                self._table = self._compiled()
                self._cache.forget()
                return self._table.encode(texts)
        found = self._cache.look_up([self._cut(text) for text in texts]) if texts else []
        lengths = np.fromiter(map(len, found), np.int64, len(found)) // array("I").itemsize
        return np.frombuffer(b"".join(found), np.uint32), lengths


def numba_is_installed() -> bool:
    """Found without importing it."""
    return find_spec("numba") is not None


def word_cache_encoder(tokenizer: Tokenizer) -> WordCacheEncoder | None:
    """An encoder with the ids of ``tokenizer``; None if it cannot be cut into words."""
    encode = tokenizer.encode_batch
    if tokenizer.kind in ("BertWordPieceLowerCase", "BertWordPieceCase"):

        def wordpiece_table() -> FlatEncoder:
            from mtk.tokenizers.word_table import WordTable, wordpiece_cuts

            return WordTable(encode, wordpiece_cuts())

        return WordCacheEncoder(bert_words, WordCache(encode), wordpiece_table)
    if not _is_sentencepiece_bpe(tokenizer):
        return None
    processor: Any = tokenizer.processor  # type: ignore[attr-defined]
    alike = all(processor.normalize(f"a{blanks}b") == f"{SPACE}a{SPACE}b" for blanks in BLANKS)

    def piece_table() -> FlatEncoder:
        from mtk.tokenizers.word_table import WordTable, piece_cuts

        pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        cuts = piece_cuts(pieces, b" \t\n\r" if alike else b" ", _unchanged(processor))
        return WordTable(encode, cuts)

    cut = _BLANKS if alike else _SINGLE_SPACE
    return WordCacheEncoder(cut.split, WordCache(encode), piece_table)


def bert_words(text: str) -> list[str]:
    """Runs of letters and digits and single punctuation marks where all is ASCII; elsewhere
    whole words between blanks. Words with control characters, which BERT's splitter drops from
    their middle, stay whole as well."""
    if _is_simple(text):
        return _PARTS.findall(text)
    words: list[str] = []
    for line in text.split("\n"):
        if _is_simple(line):
            words += _PARTS.findall(line)
            continue
        for word in line.replace("\t", " ").replace("\r", " ").split(" "):
            words += _PARTS.findall(word) if _is_simple(word) else [word]
    return words


def _is_simple(text: str) -> bool:
    return text.isascii() and _CONTROL.search(text) is None


def _is_sentencepiece_bpe(tokenizer: Tokenizer) -> bool:
    processor = getattr(tokenizer, "processor", None)
    options = tokenizer.options
    if processor is None or options.get("legacy") or options["add_bos"]:
        return False
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    if any(SPACE in piece.lstrip(SPACE) for piece in pieces):
        return False
    return _is_bpe(processor.serialized_model_proto()) and processor.normalize("a b") == (
        f"{SPACE}a{SPACE}b"
    )


def _is_bpe(model: bytes) -> bool:
    """Whether a model file says ``model_type: BPE`` (field 3 of field 2, value 2)."""
    return 2 in _values(model, 2, 3)


def _unchanged(processor: Any) -> list[str]:
    """Printable characters of ASCII that normalization leaves alone beside each other; none if
    its rules are not the library's own, for they might join any characters."""
    if not KNOWN_RULES.intersection(_values(processor.serialized_model_proto(), 3, 1)):
        return []
    printable = [chr(code) for code in range(0x21, 0x7F)]
    alone = [mark for mark in printable if processor.normalize(mark) == SPACE + mark]
    pairs = "".join(first + second for first in alone for second in alone)
    return alone if processor.normalize(pairs) == SPACE + pairs else []


def _values(model: bytes, part: int, field: int) -> list[int | bytes]:
    """What the field of a message inside a model file holds."""
    from mtk.tokenizers.protobuf import fields

    inside = next((value for number, value in fields(model) if number == part), b"")
    if not isinstance(inside, bytes):
        return []
    return [value for number, value in fields(inside) if number == field]
