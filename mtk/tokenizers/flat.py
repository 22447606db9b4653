"""Texts to one array of token ids: how a corpus is encoded, where lists would cost too much.

The reference is always the tokenizer itself, ``Tokenizer.encode_batch``. An engine is another
way to the same ids; which one may stand in for which tokenizer says ``engines.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtk.tokenizers.base import Tokenizer

Ids = npt.NDArray[Any]
Flat = tuple[Ids, npt.NDArray[np.int64]]  # ids [T] of all texts, how many each text has (sum T)
REFERENCE = "reference"


class FlatEncoder(Protocol):
    """name: what ``--tokenizer-engine`` calls it."""

    name: str

    def encode(self, texts: Sequence[str]) -> Flat:
        """Ids of all texts. Raises DataError for text that the tokenizer refuses."""
        ...


class ReferenceEncoder:
    """The tokenizer itself."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Flat:
        encoded = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.int64, int(lengths.sum()))
        return ids, lengths


def with_exceptions(
    texts: Sequence[str], except_at: Sequence[int], usual: FlatEncoder, other: FlatEncoder
) -> Flat:
    """As ``usual`` gives them, but the texts at the given places as ``other`` does."""
    if not except_at:
        return usual.encode(texts)
    apart = set(except_at)
    ids, lengths = usual.encode([text for i, text in enumerate(texts) if i not in apart])
    more_ids, more_lengths = other.encode([texts[i] for i in except_at])
    joined = np.empty(len(texts), np.int64)
    mask = np.zeros(len(texts), np.bool_)
    mask[list(except_at)] = True
    joined[mask], joined[~mask] = more_lengths, lengths
    belongs = np.repeat(mask, joined)
    found = np.empty(len(belongs), np.int64)
    found[belongs], found[~belongs] = more_ids, ids
    return found, joined
