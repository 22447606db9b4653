"""An engine watched by the tokenizer it stands in for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mtk.tokenizers import Tokenizer
from mtk.tokenizers.engines import choose_engine
from mtk.tokenizers.flat import REFERENCE, Flat, ReferenceEncoder

FIRST_CHARACTERS = 400_000  # of the beginning of every process's work, compared as a whole
EVERY = 1009  # of all records one is compared, by its number in its file
LARGEST_COMPARED = 1_000_000  # characters


class EngineMismatchError(Exception):
    """The engine's ids are not the tokenizer's: what it did so far must be done again."""

    def __init__(self, engine: str, place: str) -> None:
        super().__init__(engine, place)
        self.engine, self.place = engine, place

    def __str__(self) -> str:
        return f"the tokenizer engine {self.engine} gave other ids for {self.place}"


class CheckedEncoder:
    """Encodes groups of texts (the sentences of a document) and compares some with the
    tokenizer: the first ones it is given, later those whose number divides by ``EVERY``.

    Raises EngineMismatchError at the first id that differs.
    """

    def __init__(self, tokenizer: Tokenizer, engine: str) -> None:
        self._reference = ReferenceEncoder(tokenizer)
        self._engine = choose_engine(tokenizer, engine)
        self._first = FIRST_CHARACTERS if self._engine.name != REFERENCE else 0
        self.compared = 0

    @property
    def engine(self) -> str:
        """What encodes."""
        return self._engine.name

    def encode(self, groups: Sequence[Sequence[str]], numbers: Sequence[int], file: str) -> Flat:
        """numbers: of the record of each group, in ``file``."""
        texts = [text for group in groups for text in group]
        ids, lengths = self._engine.encode(texts)
        if self._engine.name != REFERENCE:
            self._compare(groups, numbers, file, (ids, lengths))
        return ids, lengths

    def _compare(
        self, groups: Sequence[Sequence[str]], numbers: Sequence[int], file: str, found: Flat
    ) -> None:
        chosen = list(self._chosen(groups, numbers))
        if not chosen:
            return
        ids, lengths = found
        group_ends = np.cumsum([0, *map(len, groups)])
        text_ends = np.concatenate([[0], np.cumsum(lengths)])
        for index in chosen:
            first, last = group_ends[index], group_ends[index + 1]
            right, right_lengths = self._reference.encode(groups[index])
            same = np.array_equal(lengths[first:last], right_lengths) and np.array_equal(
                ids[text_ends[first] : text_ends[last]], right
            )
            if not same:
                place = f"record {numbers[index]} of {file}"
                raise EngineMismatchError(self._engine.name, place)
            self.compared += 1

    def _chosen(self, groups: Sequence[Sequence[str]], numbers: Sequence[int]) -> Iterable[int]:
        for index, (group, number) in enumerate(zip(groups, numbers, strict=True)):
            if self._first <= 0 and number % EVERY:
                continue
            size = sum(map(len, group))
            if size <= LARGEST_COMPARED:
                yield index
            self._first -= size
