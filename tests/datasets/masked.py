"""Sentence-level sources in memory, and a small WordPiece-like vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtk.data.sentence_dataset import SentenceRules
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


def golden_source() -> SentenceSource:
    """Three documents of four sentences, without any randomness."""
    words = SIZE - FIRST_WORD
    lengths = ((9, 12, 7, 11), (8, 10, 13, 6), (14, 5, 9, 10))
    return SentenceSource(
        [
            [FIRST_WORD + (37 * d + 11 * s + 5 * np.arange(n)) % words for s, n in enumerate(row)]
            for d, row in enumerate(lengths)
        ]
    )


def fingerprint(samples: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """Of the numbers of all samples, the arrays in the order of ``names``."""
    digest = hashlib.sha256()
    for sample in samples:
        for name in names:
            digest.update(np.asarray(sample[name]).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


# Megatron-core 0.16.1 gives these samples of golden_source() in its own order, with seed 1234.
BERT_RULES = SentenceRules(32, short_seq_prob=0.5)
BERT_NAMES = ("tokens", "types", "labels", "loss_mask", "order")
BERT_GOLDEN = "b2a5fe804be72118"
T5_RULES = SentenceRules(48, 16, 0.2, 0.5)
T5_NAMES = ("tokens", "decoder_tokens", "labels", "loss_mask")
T5_GOLDEN = "698dd77675d346af"


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
