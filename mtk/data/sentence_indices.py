"""Which sentences make up which sample: the mapping behind Megatron-LM's BERT and T5 data.

Every document gives runs of its sentences. A run has a target length: the longest one, or with
a probability of about ``short`` any length from 2 tokens on. It ends once it has that many
tokens, unless fewer than two sentences would be left, which it then takes along. The samples
of an epoch are shuffled; an epoch is always drawn whole.

Left out: documents with fewer sentences than a sample needs, and documents of several sentences
of which one has more than 512 tokens.

Orders
------
``megatron``: bit for bit ``build_mapping`` of Megatron-LM. All epochs are shuffled at once, so
that the order changes with the number of samples asked for.

``epochs``: the same samples, but every epoch is shuffled on its own. Both generators go on from
epoch to epoch, so that an epoch needs nothing that comes after it: a longer training has the
same beginning. One epoch equals ``megatron``.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt

from mtk.data.gpt_indices import UINT32_MAX, IntArray, Order
from mtk.data.mersenne import mt19937, mt19937_64

LONG_SENTENCE = 512  # tokens; documents with a longer sentence are left out
SHORTEST = 2  # tokens of a sample that is to be short


@dataclass(frozen=True)
class MappingRules:
    """longest: tokens of a sample, special ones not counted, at least 2. short: probability of a
    shorter target; it is rounded to one in a whole number. least: sentences a sample needs."""

    longest: int
    short: float
    least: int


@dataclass(frozen=True)
class Corpus:
    """The documents of a split that can be used, by the numbers of their sentences.

    begins, ends: int64 [usable documents]. tokens: int64 [sentences + 1], how many tokens of the
    split lie before each sentence. first: number of the split's first sentence in the dataset;
    begins and ends count from there. few, long: documents left out for having too few sentences,
    or a long one.
    """

    begins: IntArray
    ends: IntArray
    tokens: IntArray
    first: int
    few: int
    long: int


def usable_documents(sizes: npt.NDArray[np.int32], starts: IntArray, least: int) -> Corpus:
    """The documents that samples can be made of.

    sizes: tokens of every sentence of the dataset. starts: int64 [documents + 1], the sentence
    at which each document of the split begins, and where the last one ends.
    """
    first, last = int(starts[0]), int(starts[-1])
    lengths = sizes[first:last]
    begins, ends = starts[:-1] - first, starts[1:] - first
    counts = ends - begins
    long_before = np.concatenate(([0], np.cumsum(lengths > LONG_SENTENCE, dtype=np.int64)))
    long = (counts > 1) & (long_before[ends] > long_before[begins])
    few = counts < least
    usable = ~few & ~long
    tokens = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Corpus(
        begins[usable], ends[usable], tokens, first, int(few.sum()), int((long & ~few).sum())
    )


def build_mapping(
    corpus: Corpus,
    rules: MappingRules,
    seed: int,
    num_samples: int | None,
    order: Order,
    sentences: int,
) -> IntArray:
    """int [samples, 3]: first sentence, the one after the last, and the target length of each
    sample, in the order of training; uint32, or uint64 for more ``sentences`` (of the whole
    dataset) than that can count. At least ``num_samples`` (None: one epoch).

    Takes about a second per million samples. ValueError if no document can be used.
    """
    if not len(corpus.begins):
        raise ValueError("no document can be used")
    targets = _targets(seed, rules)
    walk = _Walk(corpus, rules)
    generator = Numbers(seed + 1)
    epochs: list[IntArray] = []
    samples = 0
    while not epochs or samples < (num_samples or 0):
        rows = walk.epoch(targets)
        samples += len(rows)
        epochs.append(rows if order == "megatron" else shuffled_rows(rows, generator))
    mapping = np.concatenate(epochs)
    if order == "megatron":
        mapping = shuffled_rows(mapping, generator)
    mapping[:, :2] += corpus.first
    return mapping.astype(np.uint32 if sentences <= UINT32_MAX else np.uint64)


def _targets(seed: int, rules: MappingRules) -> Iterator[int]:
    """Target lengths: one for each sample, and one more at the end of each document."""
    if rules.short <= 0:
        return repeat(rules.longest)
    ratio = math.floor(1 / rules.short + 0.5)

    def lengths(drawn: npt.NDArray[np.uint32]) -> list[int]:
        numbers = drawn.astype(np.int64)
        short = SHORTEST + numbers % (rules.longest - 1)
        found: list[int] = np.where(numbers % ratio == 0, short, rules.longest).tolist()
        return found

    return chain.from_iterable(map(lengths, mt19937(seed)))


class _Walk:
    """From sample to sample through the documents, without looking at every sentence."""

    def __init__(self, corpus: Corpus, rules: MappingRules) -> None:
        self._rules = rules
        # Views give plain numbers, not numpy's: the walk takes them one at a time.
        self._begins, self._ends = corpus.begins.data, corpus.ends.data
        self._tokens = corpus.tokens.data
        self._reach = self._longest_from_each(corpus).data

    def _longest_from_each(self, corpus: Corpus) -> IntArray:
        """Where a sample of the longest target ends that begins at each sentence."""
        tokens = corpus.tokens
        count = len(tokens) - 1
        reach = np.searchsorted(tokens, tokens[:-1] + self._rules.longest)
        reach = np.maximum(reach, np.arange(count) + self._rules.least)
        finish = np.full(count, count, dtype=np.int64)
        lengths = corpus.ends - corpus.begins
        inside = np.repeat(corpus.begins, lengths) + _counters(lengths)
        finish[inside] = np.repeat(corpus.ends, lengths)
        return np.where(reach <= finish - 2, reach, finish)

    def epoch(self, targets: Iterator[int]) -> IntArray:
        """int64 [samples, 3]: all samples of the corpus, in its order."""
        tokens, reach = self._tokens, self._reach
        longest, least = self._rules.longest, self._rules.least
        rows = array("q")
        for begin, finish in zip(self._begins, self._ends, strict=True):
            target = next(targets)
            while begin < finish:
                if target == longest:
                    end = reach[begin]
                else:
                    full = bisect_left(tokens, tokens[begin] + target, begin, finish + 1)
                    end = max(full, begin + least)
                    end = end if end <= finish - 2 else finish
                rows.extend((begin, end, target))
                begin = end
                target = next(targets)
        return np.frombuffer(rows, dtype=np.int64).reshape(-1, 3)


def _counters(lengths: IntArray) -> IntArray:
    """0, 1, ... for each of ``lengths``, one after another."""
    ends = np.cumsum(lengths)
    found: IntArray = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
    return found


class Numbers:
    """Outputs of ``std::mt19937_64`` in pieces of any length."""

    def __init__(self, seed: int) -> None:
        self._blocks = mt19937_64(seed)
        self._rest = np.empty(0, dtype=np.uint64)

    def take(self, count: int) -> npt.NDArray[np.uint64]:
        parts, have = [self._rest], len(self._rest)
        while have < count:
            parts.append(next(self._blocks))
            have += len(parts[-1])
        numbers = np.concatenate(parts)
        self._rest = numbers[count:]
        return numbers[:count]


def shuffled_rows(rows: IntArray, numbers: Numbers) -> IntArray:
    """Fisher-Yates from the end, the partner of place ``i`` being a number modulo ``i + 1``."""
    count = len(rows)
    places = np.arange(count, 1, -1, dtype=np.uint64)
    partners = (numbers.take(len(places)) % places).astype(np.int64)
    order = np.arange(count, dtype=np.int64)
    view = order.data
    for place, partner in zip(range(count - 1, 0, -1), partners.data, strict=True):
        view[place], view[partner] = view[partner], view[place]
    shuffled: IntArray = rows[order]
    return shuffled
