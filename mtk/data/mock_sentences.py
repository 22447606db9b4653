"""Sentences out of nothing, and a vocabulary for them: trying BERT and T5 without a corpus."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtk.data.word_vocabulary import WordVocabulary
from mtk.errors import ConfigError, Problem

DOCUMENTS = 10_000
SENTENCES = (2, 24)  # of a document; the end is exclusive
TOKENS = (4, 64)  # of a sentence; the end is exclusive
SENTINELS = 100
SMALLEST = 16  # ids of a vocabulary
CONTINUES_EVERY = 4


def mock_vocabulary(vocab_size: int) -> WordVocabulary:
    """Text from id 1 on, every fourth of its ids going on with a word; then sentinels (a quarter
    of the vocabulary, 100 at most), EOS, BOS, MASK, SEP and, last, CLS; 0 is padding.

    Raises ConfigError for fewer than 16 ids.
    """
    if vocab_size < SMALLEST:
        rule = f"must be at least {SMALLEST} for the special ids of --mock-data"
        raise ConfigError([Problem("model.vocab_size", vocab_size, rule, f"Nearest: {SMALLEST}.")])
    first_special = vocab_size - 5
    first_sentinel = first_special - min(SENTINELS, vocab_size // 4)
    ids = np.arange(vocab_size, dtype=np.int64)
    continues = (ids % CONTINUES_EVERY == 0) & (ids > 0) & (ids < first_sentinel)
    eos, bos, mask, sep, cls = range(first_special, vocab_size)
    return WordVocabulary(
        vocab_size,
        ids,
        continues,
        cls=cls,
        sep=sep,
        mask=mask,
        bos=bos,
        eos=eos,
        sentinels=tuple(range(first_sentinel, first_special)),
    )


class MockSentences:
    """10,000 documents of 2 to 23 sentences of 4 to 63 tokens, drawn with a fixed seed.

    The tokens of a document count on through its sentences, so that there is something to learn:
    which of two segments comes first, and what stood where a token is masked. Implements
    :class:`~mtk.data.token_source.TokenSource` in memory.
    """

    def __init__(self, vocabulary: WordVocabulary) -> None:
        self._text_ids = min(vocabulary.sentinels) - 1
        rng = np.random.default_rng(0)
        counts = rng.integers(*SENTENCES, size=DOCUMENTS)
        self.document_indices = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        sentences = int(self.document_indices[-1])
        self.sizes = rng.integers(*TOKENS, size=sentences, dtype=np.int32)
        before = np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))[:-1]
        firsts = before[self.document_indices[:-1]]
        document = np.repeat(np.arange(DOCUMENTS, dtype=np.int64), counts)
        # Each document begins elsewhere in the vocabulary.
        self._begins = before - firsts[document] + 7 * document

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.generic]:
        size = int(self.sizes[i])
        stop = size if length is None else min(offset + length, size)
        places = int(self._begins[i]) + np.arange(offset, stop, dtype=np.int64)
        return 1 + places % self._text_ids
