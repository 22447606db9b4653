"""What the samples of BERT and T5 have in common: runs of whole sentences, drawn by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mtk.data.gpt_indices import IntArray, Order
from mtk.data.id_check import check_ids, read_piece
from mtk.data.index_cache import IndexCache, index_digest
from mtk.data.masking import Masking
from mtk.data.sentence_indices import (
    LONG_SENTENCE,
    Corpus,
    MappingRules,
    build_mapping,
    usable_documents,
)
from mtk.data.token_source import Notify, Piece, TokenSource, ignore
from mtk.data.word_vocabulary import WordVocabulary
from mtk.errors import DataError

Sample = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class SentenceRules:
    """How samples are made. length: tokens of a sample (of T5's encoder). decoder_length: of
    T5's decoder. mask_prob: share of tokens to mask. short_seq_prob: of samples to be shorter.
    pairs: BERT samples are two segments, whose order is to be told.
    """

    length: int
    decoder_length: int = 128
    mask_prob: float = 0.15
    short_seq_prob: float = 0.1
    pairs: bool = True


@dataclass(frozen=True)
class Sentences:
    """A split of a sentence-level dataset. documents: numbers of its documents. vocabulary: ids
    beyond it are refused when they are read. name: in messages."""

    source: TokenSource
    documents: range
    vocabulary: WordVocabulary
    name: str = "dataset"

    @property
    def starts(self) -> IntArray:
        """int64 [documents + 1]: where each document begins, and where the last one ends."""
        documents = self.documents
        starts: IntArray = self.source.document_indices[documents.start : documents.stop + 1]
        return starts.astype(np.int64)


class SentenceDataset(ABC):
    """Samples after Megatron-core's MaskedWordPieceDataset.

    Sample ``k`` is a run of sentences from :mod:`mtk.data.sentence_indices`; everything random
    in it is drawn from ``RandomState(seed + k)``, so that it depends on nothing else.

    num_samples: how many are needed at least (epochs are added until they suffice); None is one
    epoch. cache: where the index array is kept; None keeps it in memory.

    Raises DataError if not a single sample can be made.
    """

    masking: ClassVar[Masking]
    special_tokens: ClassVar[int]  # of a sample, beside the text

    def __init__(
        self,
        sentences: Sentences,
        rules: SentenceRules,
        num_samples: int | None,
        seed: int,
        order: Order = "epochs",
        cache: IndexCache | None = None,
        notify: Notify = ignore,
    ) -> None:
        self.name = sentences.name
        self.rules = rules
        self.vocabulary = sentences.vocabulary
        self._source = sentences.source
        self._seed = seed
        self._mapping = self._load_or_build(sentences, num_samples, order, cache, notify)

    @property
    @abstractmethod
    def least_sentences(self) -> int:
        """Sentences that a sample needs."""

    @abstractmethod
    def __getitem__(self, k: int) -> Sample: ...

    def __len__(self) -> int:
        """All samples of the epochs begun; at least ``num_samples``."""
        return len(self._mapping)

    def sentences_of(self, k: int) -> list[npt.NDArray[np.int64]]:
        """The ids of each sentence of sample ``k``. Raises DataError for ids outside the
        vocabulary and unreadable data."""
        found = []
        for piece in self.documents_of(k):
            ids = read_piece(self._source, piece, self.name)
            check_ids(ids, piece, self._source, self.name, self.vocabulary.size)
            found.append(ids.astype(np.int64))
        return found

    def target_of(self, k: int) -> int:
        """How many tokens of text sample ``k`` may have."""
        return int(self._mapping[k, 2])

    def state_of(self, k: int) -> np.random.RandomState:
        """The generator of everything random in sample ``k``."""
        return np.random.RandomState((self._seed + k) % 2**32)

    def documents_of(self, k: int) -> list[Piece]:
        if not 0 <= k < len(self):
            raise IndexError(f"sample {k} of {len(self)}")
        begin, end, _ = self._mapping[k].tolist()
        return [Piece(i, 0, int(self._source.sizes[i])) for i in range(begin, end)]

    def source_of(self, k: int) -> str:
        del k
        return self.name

    def _load_or_build(
        self,
        sentences: Sentences,
        num_samples: int | None,
        order: Order,
        cache: IndexCache | None,
        notify: Notify,
    ) -> IntArray:
        least, longest = self.least_sentences, self.rules.length - self.special_tokens
        rules = MappingRules(longest, self.rules.short_seq_prob, least)
        starts, sizes = sentences.starts, sentences.source.sizes

        def build() -> dict[str, IntArray]:
            corpus = usable_documents(sizes, starts, least)
            tell_left_out(corpus, least, len(sentences.documents), self.name, notify)
            found = build_mapping(corpus, rules, self._seed, num_samples, order, len(sizes))
            return {"mapping": found}

        if cache is None:
            return build()["mapping"]
        description = {
            "order": order,
            "seed": self._seed,
            "longest": longest,
            "short": float(rules.short).hex(),
            "least": least,
            "samples": num_samples,
            # The array depends on nothing else of the data, wherever it lies.
            "starts": index_digest(starts),
            "lengths": index_digest(sizes[int(starts[0]) : int(starts[-1])]),
            "sentences": len(sizes),
        }
        return cache.load_or_build("sentences", description, build)["mapping"]


def tell_left_out(corpus: Corpus, least: int, count: int, name: str, notify: Notify) -> None:
    """Say which documents give no sample. Raises DataError if none does."""
    if not corpus.few and not corpus.long:
        return
    few = f"{corpus.few} of {count} documents have fewer than {least} sentences"
    long = f"{corpus.long} have a sentence of more than {LONG_SENTENCE} tokens"
    if len(corpus.begins):
        notify(f"{name}: {few}, {long}: they are left out")
        return
    raise DataError(
        f"{name}: {few}, {long}: no sample can be made. Preprocess with --split-sentences"
        + (", or leave the order of segments out with --bert-no-binary-head." if least > 1 else ".")
    )


def padded(ids: npt.NDArray[np.int64], length: int, value: int = 0) -> npt.NDArray[np.int64]:
    """``ids`` filled up to ``length``."""
    return np.pad(ids, (0, length - len(ids)), constant_values=value)
