"""Which sentences make up which block: the mapping behind Megatron-LM's ICT data (REALM).

The inverse cloze task (Lee et al. 2019) learns to find the block of text that a sentence was
taken from. Every document gives runs of its sentences, blocks. A block ends once it and the title
of its document fill a sample, unless too few sentences would be left, which it then takes along.
Nothing is drawn but the order of blocks.

Left out: documents with fewer sentences than a block needs (two, or one), and those with a
sentence of more than 512 tokens.

Orders are those of :mod:`mtk.data.sentence_indices`. One thing differs from Megatron-LM: titles
are those of the documents themselves. There they are counted from the beginning of a split, so
that all splits but the first get titles of other documents.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtk.data.gpt_indices import UINT32_MAX, IntArray, Order
from mtk.data.sentence_indices import LONG_SENTENCE, Numbers, shuffled_rows


@dataclass(frozen=True)
class BlockRules:
    """longest: tokens of block and title together, special ones not counted. one_sentence: a
    block may be a single sentence."""

    longest: int
    one_sentence: bool = False

    @property
    def least(self) -> int:
        """Sentences that a block needs, and that must be left for another one."""
        return 1 if self.one_sentence else 2


@dataclass(frozen=True)
class BlockCorpus:
    """The documents of a split that blocks can be made of.

    documents: int64, their numbers in the dataset. begins, ends: int64, their sentences.
    targets: int64, tokens at which a block of each is full. tokens: int64 [sentences of the
    split + 1], how many lie before each; first: the split's first sentence. few, long:
    documents left out for having too few sentences, or a long one.
    """

    documents: IntArray
    begins: IntArray
    ends: IntArray
    targets: IntArray
    tokens: IntArray
    first: int
    few: int
    long: int


def block_documents(
    sizes: npt.NDArray[np.int32],
    starts: IntArray,
    titles: IntArray,
    rules: BlockRules,
    first_document: int = 0,
) -> BlockCorpus:
    """The usable documents of a split.

    sizes: tokens of every sentence of the dataset. starts: int64 [documents + 1], where each
    document of the split begins, and where the last one ends. titles: tokens of their titles
    [documents]. first_document: the number of the split's first.
    """
    first, last = int(starts[0]), int(starts[-1])
    lengths = sizes[first:last]
    counts = np.diff(starts)
    long_before = np.concatenate(([0], np.cumsum(lengths > LONG_SENTENCE, dtype=np.int64)))
    few = counts < rules.least
    long = ~few & (long_before[starts[1:] - first] > long_before[starts[:-1] - first])
    usable = np.flatnonzero(~few & ~long)
    return BlockCorpus(
        documents=first_document + usable,
        begins=starts[:-1][usable].astype(np.int64),
        ends=starts[1:][usable].astype(np.int64),
        targets=rules.longest - titles[usable].astype(np.int64),
        tokens=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        first=first,
        few=int(few.sum()),
        long=int(long.sum()),
    )


def build_blocks(
    corpus: BlockCorpus,
    rules: BlockRules,
    seed: int,
    num_samples: int | None,
    order: Order,
    sentences: int,
) -> IntArray:
    """int [samples, 4]: first sentence, the one after the last, document, and number of the
    block in its epoch, in the order of training; uint32, or uint64 for more ``sentences`` (of
    the whole dataset) than that can count. At least ``num_samples`` (None: one epoch).

    Takes about a second per million blocks. ValueError if no document can be used.
    """
    if not len(corpus.begins):
        raise ValueError("no document can be used")
    epoch = _one_epoch(corpus, rules)
    epochs = max(1, -(-(num_samples or 0) // len(epoch)))
    generator = Numbers(seed + 1)
    if order == "megatron":
        blocks = shuffled_rows(np.tile(epoch, (epochs, 1)), generator)
    else:
        blocks = np.concatenate([shuffled_rows(epoch, generator) for _ in range(epochs)])
    return blocks.astype(np.uint32 if sentences <= UINT32_MAX else np.uint64)


def _one_epoch(corpus: BlockCorpus, rules: BlockRules) -> IntArray:
    """int64 [blocks, 4], in the order of the corpus."""
    tokens, first, least = corpus.tokens.data, corpus.first, rules.least
    rows = array("q")
    block = 0
    walk = zip(corpus.documents, corpus.begins, corpus.ends, corpus.targets, strict=True)
    for document, begin, finish, target in walk:
        start, stop = int(begin) - first, int(finish) - first
        while start < stop:
            full = bisect_left(tokens, tokens[start] + int(target), start, stop + 1)
            end = max(full, start + least)
            if stop - end < least:
                end = stop
            rows.extend((start + first, end + first, int(document), block))
            start, block = end, block + 1
    return np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)
