"""Sentence-level sources in memory, and a small WordPiece-like vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtk.data.token_source import TokenSource
from mtk.data.word_vocabulary import WordVocabulary
from tests.datasets.sources import MemorySource

PAD, CLS, SEP, MASK, BOS, EOS = range(6)
FIRST_SENTINEL, SENTINELS = 6, 100
FIRST_WORD = FIRST_SENTINEL + SENTINELS
SIZE = 400


def pieces() -> list[str]:
    """Every third piece of text goes on with a word."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]"]
    names += [f"<extra_id_{i}>" for i in range(SENTINELS)]
    text = range(FIRST_WORD, SIZE)
    return names + [f"##p{i}" if i % 3 == 0 else f"w{i}" for i in text]


def vocabulary(**changes: Any) -> WordVocabulary:
    names = pieces()
    values: dict[str, Any] = {
        "size": SIZE,
        "ids": np.arange(SIZE),
        "continues": np.array([name.startswith("##") for name in names]),
        "pad": PAD,
        "cls": CLS,
        "sep": SEP,
        "mask": MASK,
        "bos": BOS,
        "eos": EOS,
        "sentinels": tuple(range(FIRST_SENTINEL, FIRST_WORD)),
    }
    return WordVocabulary(**{**values, **changes})


class SentenceSource(MemorySource):
    """Documents of sentences."""

    def __init__(self, documents: Sequence[Sequence[np.ndarray]]) -> None:
        super().__init__([sentence for document in documents for sentence in document])
        counts = [len(document) for document in documents]
        self.document_indices = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def random_source(
    rng: np.random.Generator, documents: int, *, most: int = 40, long: float = 0.0
) -> TokenSource:
    """Documents of 0 to 11 sentences of up to ``most`` words; ``long``: share of sentences
    with more than 512 tokens."""

    def sentence() -> np.ndarray:
        size = 600 if rng.random() < long else int(rng.integers(0, most))
        return rng.integers(FIRST_WORD, SIZE, size=size)

    return SentenceSource(
        [[sentence() for _ in range(int(rng.integers(0, 12)))] for _ in range(documents)]
    )
