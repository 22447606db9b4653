"""Which words of a sample are hidden from a model, draw for draw as Megatron-LM chooses them.

Candidates are whole words: a piece that goes on with a word belongs to the one before it. At
each word n-grams begin, of 1 to ``longest`` words. Beginnings are tried in random order, each
with a random n that shrinks as long as the n-gram would exceed the budget; an n-gram that
touches a masked token is passed over.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mtk.data.word_vocabulary import WordVocabulary

GEOMETRIC = 0.2  # SpanBERT (Joshi et al. 2020), section 3.1


@dataclass(frozen=True)
class Masking:
    """longest: words of the longest n-gram. geometric: n is drawn from a geometric distribution
    (p = 0.2, cut at ``longest``), else with weights 1/n."""

    longest: int
    geometric: bool

    @cached_property
    def _cumulated(self) -> list[float]:
        """Distribution function of n, with numpy's own steps of rounding."""
        weights = 1.0 / (np.arange(self.longest, dtype=np.int64) + 1)
        weights = weights / weights.sum(keepdims=True)
        cumulated = (weights / weights.sum(keepdims=True)).cumsum()
        return list((cumulated / cumulated[-1]).tolist())

    def draw(self, state: np.random.RandomState) -> int:
        """n of the next n-gram."""
        if self.geometric:
            return min(int(state.geometric(GEOMETRIC)), self.longest)
        return bisect_right(self._cumulated, state.random_sample()) + 1


BERT_MASKING = Masking(3, geometric=False)
T5_MASKING = Masking(10, geometric=True)


def mask_budget(share: float, tokens: int, target: int) -> float:
    """How many of ``tokens`` tokens may be masked in a sample with this target length."""
    return min(share * target, max(1, round(tokens * share)))


@dataclass(frozen=True)
class Words:
    """positions: of all tokens that belong to words, rising. heads: where in ``positions`` each
    word begins, and at last where they end."""

    positions: list[int]
    heads: list[int]

    def __len__(self) -> int:
        return len(self.heads) - 1

    def __getitem__(self, i: int) -> list[int]:
        return self.positions[self.heads[i] : self.heads[i + 1]]


def words_of(tokens: npt.NDArray[np.int64], vocabulary: WordVocabulary) -> Words:
    """The words of a sample: everything but CLS and SEP.

    A piece that goes on with a word does so across a SEP too (as in Megatron-LM).
    """
    special = np.zeros(len(tokens), dtype=np.bool_)
    for token in (vocabulary.cls, vocabulary.sep):
        if token is not None:
            special |= tokens == token
    positions = np.flatnonzero(~special)
    begins = ~vocabulary.continues[tokens[positions]]
    begins[:1] = True
    heads = np.flatnonzero(begins).tolist()
    return Words(positions.tolist(), [*heads, len(positions)])


def choose_spans(
    words: Words,
    masking: Masking,
    budget: float,
    state: np.random.RandomState,
    replace: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Positions of the n-grams that are masked, in the order of their choice.

    replace: told of every masked position in turn; draws from the same ``state``.
    """
    order = np.arange(len(words))
    state.shuffle(order)
    heads, count = words.heads, len(words)
    hidden: set[int] = set()
    spans: list[list[int]] = []
    for i in order.tolist():
        if len(hidden) >= budget:
            break
        n = masking.draw(state)
        begin, room = heads[i], budget - len(hidden)
        while n and heads[min(i + n, count)] - begin > room:
            n -= 1
        span = words.positions[begin : heads[min(i + n, count)]]
        if not span or not hidden.isdisjoint(span):
            continue
        hidden.update(span)
        spans.append(span)
        if replace is not None:
            for position in span:
                replace(position)
    return spans
