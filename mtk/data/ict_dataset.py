"""Samples of the inverse cloze task (ICT, REALM): a sentence, and the block it was taken from.

As Megatron-LM's ICTDataset, with one difference: what is random in sample ``k`` depends on the
seed and ``k`` alone. There one generator goes through all samples in the order in which they are
asked for, so that a continued training, or another number of ranks, draws others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtk.data.gpt_indices import IntArray, Order
from mtk.data.ict_indices import BlockCorpus, BlockRules, block_documents, build_blocks
from mtk.data.id_check import check_ids, read_piece
from mtk.data.index_cache import IndexCache, index_digest
from mtk.data.sentence_dataset import Sample, Sentences, padded
from mtk.data.sentence_indices import LONG_SENTENCE
from mtk.data.token_source import Notify, Piece, TokenSource, ignore
from mtk.errors import DataError

SPECIAL_TOKENS = 3  # of a block with a title: CLS, and SEP after title and text
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IctRules:
    """length: tokens of a query and of a block, each. query_in_block_prob: how often the
    sentence also stays in its block. one_sentence: blocks may be single sentences."""

    length: int
    query_in_block_prob: float = 0.1
    one_sentence: bool = False

    @property
    def blocks(self) -> BlockRules:
        return BlockRules(self.length - SPECIAL_TOKENS, self.one_sentence)


class IctDataset:
    """Queries and blocks of a split of a sentence-level dataset.

    titles: a dataset of equally many documents, the titles of those of ``sentences``; None:
    blocks have none. num_samples, seed, order, cache: as of
    :class:`~mtk.data.sentence_dataset.SentenceDataset`.

    Raises DataError if titles and text do not belong together, and if not a single block can
    be made; ValueError for a vocabulary without CLS and SEP.
    """

    def __init__(
        self,
        sentences: Sentences,
        titles: TokenSource | None,
        rules: IctRules,
        num_samples: int | None,
        seed: int,
        order: Order = "epochs",
        cache: IndexCache | None = None,
        notify: Notify = ignore,
    ) -> None:
        vocabulary = sentences.vocabulary
        if vocabulary.cls is None or vocabulary.sep is None:
            raise ValueError("the vocabulary has no CLS and SEP")
        self.name, self.rules, self.vocabulary = sentences.name, rules, vocabulary
        self._cls, self._sep = vocabulary.cls, vocabulary.sep
        self._source, self._titles, self._seed = sentences.source, titles, seed
        self._check_titles()
        self._blocks = self._load_or_build(sentences, num_samples, order, cache, notify)

    def __len__(self) -> int:
        """All samples of the epochs begun; at least ``num_samples``."""
        return len(self._blocks)

    def __getitem__(self, k: int) -> Sample:
        """Sample ``k``: ``query_tokens``, ``context_tokens`` int64 [S], padded; of each
        ``..._pad_mask`` int64 [S], 0 for padding, and ``..._mask`` bool [S, S], which tokens may
        look at which; ``block_data`` int64 [4]: first sentence, the one after the last,
        document, number of the block.

        Raises DataError for ids outside the vocabulary and unreadable data.
        """
        begin, end, document, _ = self.block_of(k)
        query, block = self._taken(self._sentences(begin, end), k)
        special = SPECIAL_TOKENS if self._titles is not None else SPECIAL_TOKENS - 1
        title = self.title_of(document)[: self.rules.length - special]
        room = self.rules.length - special - len(title)
        query = np.concatenate(([self._cls], query[: self.rules.length - 2], [self._sep]))
        head = [[self._cls], title, [self._sep]] if self._titles is not None else [[self._cls]]
        context = np.concatenate([*head, block[:room], [self._sep]])
        return {
            **self._filled("query", query),
            **self._filled("context", context),
            "block_data": np.array(self.block_of(k), dtype=np.int64),
        }

    def block_of(self, k: int) -> tuple[int, int, int, int]:
        """First sentence of the block, the one after its last, document, number of the block."""
        if not 0 <= k < len(self):
            raise IndexError(f"sample {k} of {len(self)}")
        begin, end, document, block = self._blocks[k].tolist()
        return begin, end, document, block

    def title_of(self, document: int) -> Ids:
        """The ids of a document's title; none without titles."""
        titles = self._titles
        if titles is None:
            return np.empty(0, dtype=np.int64)
        first, last = titles.document_indices[document : document + 2].tolist()
        pieces = [Piece(i, 0, int(titles.sizes[i])) for i in range(first, last)]
        return self._read(titles, pieces, f"titles of {self.name}")

    def documents_of(self, k: int) -> list[Piece]:
        begin, end, _, _ = self.block_of(k)
        return [Piece(i, 0, int(self._source.sizes[i])) for i in range(begin, end)]

    def source_of(self, k: int) -> str:
        del k
        return self.name

    def _sentences(self, begin: int, end: int) -> list[Ids]:
        sizes = self._source.sizes
        pieces = [[Piece(i, 0, int(sizes[i]))] for i in range(begin, end)]
        return [self._read(self._source, piece, self.name) for piece in pieces]

    def _taken(self, sentences: list[Ids], k: int) -> tuple[Ids, Ids]:
        """A sentence of the block, and the text of the block, in which it often lacks."""
        state = np.random.RandomState((self._seed + k) % 2**32)
        place = int(state.randint(0, len(sentences)))
        query = sentences[place]
        if state.random_sample() >= self.rules.query_in_block_prob:
            sentences = sentences[:place] + sentences[place + 1 :]
        return query, np.concatenate([np.empty(0, dtype=np.int64), *sentences])

    def _read(self, source: TokenSource, pieces: Sequence[Piece], name: str) -> Ids:
        parts = [np.empty(0, dtype=np.int64)]
        for piece in pieces:
            ids = read_piece(source, piece, name)
            check_ids(ids, piece, source, name, self.vocabulary.size)
            parts.append(ids.astype(np.int64))
        return np.concatenate(parts)

    def _filled(self, name: str, ids: Ids) -> Sample:
        length = self.rules.length
        there = padded(np.ones(len(ids), dtype=np.int64), length)
        return {
            f"{name}_tokens": padded(ids, length, self.vocabulary.pad),
            f"{name}_pad_mask": there,
            f"{name}_mask": np.outer(there, there).astype(bool),
        }

    def _check_titles(self) -> None:
        if self._titles is None:
            return
        count = len(self._source.document_indices) - 1
        found = len(self._titles.document_indices) - 1
        if found != count:
            raise DataError(
                f"{self.name} has {count} documents, but there are {found} titles. Preprocess "
                f"text and titles from the same records (--json-keys text title)."
            )

    def _load_or_build(
        self,
        sentences: Sentences,
        num_samples: int | None,
        order: Order,
        cache: IndexCache | None,
        notify: Notify,
    ) -> IntArray:
        rules, starts = self.rules.blocks, sentences.starts
        documents, sizes = sentences.documents, self._source.sizes
        titles = self._title_lengths(documents)

        def build() -> dict[str, IntArray]:
            corpus = block_documents(sizes, starts, titles, rules, documents.start)
            _tell_left_out(corpus, rules, len(documents), self.name, notify)
            found = build_blocks(corpus, rules, self._seed, num_samples, order, len(sizes))
            return {"blocks": found}

        if cache is None:
            return build()["blocks"]
        description = {
            "order": order,
            "seed": self._seed,
            "longest": rules.longest,
            "one_sentence": rules.one_sentence,
            "samples": num_samples,
            # The array depends on nothing else of the data, wherever it lies.
            "first": documents.start,
            "starts": index_digest(starts),
            "titles": index_digest(titles),
            "lengths": index_digest(sizes[int(starts[0]) : int(starts[-1])]),
            "sentences": len(sizes),
        }
        return cache.load_or_build("blocks", description, build)["blocks"]

    def _title_lengths(self, documents: range) -> IntArray:
        """int64 [documents]: tokens of each title."""
        titles = self._titles
        if titles is None:
            return np.zeros(len(documents), dtype=np.int64)
        before = np.concatenate(([0], np.cumsum(titles.sizes, dtype=np.int64)))
        bounds = titles.document_indices[documents.start : documents.stop + 1]
        lengths: IntArray = np.diff(before[bounds])
        return lengths


def _tell_left_out(
    corpus: BlockCorpus, rules: BlockRules, count: int, name: str, notify: Notify
) -> None:
    """Say which documents give no block. Raises DataError if none does."""
    few = f"{corpus.few} of {count} documents have fewer than {rules.least} sentences"
    long = f"{corpus.long} have a sentence of more than {LONG_SENTENCE} tokens"
    if len(corpus.begins):
        if corpus.few or corpus.long:
            notify(f"{name}: {few}, {long}: they are left out")
        return
    raise DataError(
        f"{name}: {few}, {long}: no block can be made. Preprocess with --split-sentences"
        + ("." if rules.one_sentence else ", or let blocks be single sentences.")
    )
