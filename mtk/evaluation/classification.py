"""Texts with a label, and the sequences that BERT classifies them by.

A task is a row of ``mtk.config.heads``: how many sequences a sample has, how many values the
head gives for each.
RACE has four sequences of one value (a choice each), MNLI and QQP one sequence of as many
values as there are classes. A sample is, as in Megatron-LM's tasks, ``[CLS] A [SEP] B [SEP]``.

Shape suffixes: C choices (sequences of a sample), S sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mtk.config.heads import ClassificationTask
from mtk.errors import ConfigError, DataError, Problem
from mtk.tokenizers import Tokenizer


@dataclass(frozen=True)
class LabelledText:
    """A sample before tokenisation. pairs: (A, B) of each sequence, cleaned. uid: the file's own
    number, or a running one. origin: e.g. ``dev.tsv:17``."""

    uid: int
    label: int
    pairs: tuple[tuple[str, str], ...]
    origin: str


@dataclass(frozen=True)
class ClassificationSample:
    """text: ids [C, S]. types: 0 for A, 1 for B, the pad id in the padding, [C, S]. mask: 1
    where there is text, [C, S]. label: 0 .. classes - 1."""

    text: NDArray[np.int64]
    types: NDArray[np.int64]
    mask: NDArray[np.int64]
    label: int
    uid: int


class ClassificationData:
    """The samples of one file or folder, tokenised when they are asked for.

    name: for reports, e.g. ``dev-matched``. Raises ConfigError for a tokenizer without CLS, SEP
    or padding, and for a length that has no room for them.
    """

    def __init__(
        self,
        task: ClassificationTask,
        texts: Sequence[LabelledText],
        tokenizer: Tokenizer,
        seq_length: int,
        name: str = "",
    ) -> None:
        self.task, self.name, self.seq_length = task, name, seq_length
        self._texts, self._tokenizer = texts, tokenizer
        roles = {"CLS": tokenizer.cls, "SEP": tokenizer.sep, "padding": tokenizer.pad}
        absent = [role for role, token in roles.items() if token is None]
        if absent:
            rule = f"has no {', '.join(absent)} token, which {task.name} needs"
            fix = "Use a WordPiece tokenizer of BERT."
            raise ConfigError([Problem("tokenizer.tokenizer_type", tokenizer.kind, rule, fix)])
        if seq_length < 4:
            rule = "leaves no room between [CLS] and [SEP]"
            raise ConfigError([Problem("model.seq_length", seq_length, rule, "Nearest: 4.")])
        # The article of a question stands in each of its choices, and in its neighbours.
        self._encoded = lru_cache(maxsize=256)(tokenizer.encode_alone)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> ClassificationSample:
        sample = self._texts[index]
        rows = [self._row(first, second, sample.origin) for first, second in sample.pairs]
        text, types, mask = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
        return ClassificationSample(text, types, mask, sample.label, sample.uid)

    def label(self, index: int) -> int:
        return self._texts[index].label

    def uid(self, index: int) -> int:
        return self._texts[index].uid

    def origin(self, index: int) -> str:
        """File and line of a sample."""
        return self._texts[index].origin

    def _row(self, first: str, second: str, origin: str) -> tuple[list[int], list[int], list[int]]:
        try:
            first_ids = self._encoded(first)[: self.task.first_limit]
            second_ids = self._encoded(second)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        tokenizer = self._tokenizer
        return pair_sequence(
            first_ids,
            second_ids,
            self.seq_length,
            cls=_known(tokenizer.cls),
            sep=_known(tokenizer.sep),
            pad=_known(tokenizer.pad),
        )


def _known(token: int | None) -> int:
    if token is None:
        raise ValueError("the tokenizer was checked for its special tokens")
    return token


def pair_sequence(
    first: Sequence[int], second: Sequence[int], seq_length: int, *, cls: int, sep: int, pad: int
) -> tuple[list[int], list[int], list[int]]:
    """``[CLS] A [SEP] B [SEP]`` and padding: ids, types, mask, each of ``seq_length``.

    What is too long is cut at its end, so that the last id is SEP. Types of padding are the pad
    id, as Megatron-LM writes them.
    """
    ids = [*[cls, *first, sep, *second][: seq_length - 1], sep]
    types = [0] * min(len(first) + 2, seq_length - 1)
    types += [1] * (len(ids) - len(types))
    rest = seq_length - len(ids)
    return ids + [pad] * rest, types + [pad] * rest, [1] * len(ids) + [0] * rest


def clean_text(text: str) -> str:
    """One line, single spaces, no space before the full stop of a sentence."""
    text = re.sub(r"\s+", " ", text.replace("\n", " "))
    for _ in range(3):
        text = text.replace(" . ", ". ")
    return text
