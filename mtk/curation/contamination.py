"""Cutting what evaluation sets hold out of training texts, as Megatron-LM's n-gram filter does.

At a match the text is cut: 200 characters before it and from there back to the end of the
sentence before, 200 behind it and on to the end of that sentence. What is left of the cut is
a piece if it is long enough; what is right of it is looked at again. A text that falls into
too many pieces is dropped. N-grams that the corpus holds often are common phrases and cut
nothing.

Its places are exact here (it measured a match by its words joined with single spaces).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.curation.ngrams import Hit, NgramTable
from mtk.curation.pages import Page, Place, Stretch, open_page
from mtk.curation.sifting import (
    BadLines,
    Judge,
    Reporting,
    Sifted,
    Verdict,
    bad_lines,
    sift,
)
from mtk.data.records import BadRecord, RecordError, bad_record

SENTENCE_ENDS = ".!?"
NOTHING_LEFT, PIECES = "nothing left", "too many pieces"
CUT = "cut"
COUNTS, USED = "counts.npy", "used.npy"
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CutRules:
    """margin: characters that go with a match on each side. min_piece: a piece must have more
    characters. max_pieces: a text of more is dropped."""

    margin: int
    min_piece: int
    max_pieces: int


def cut(text: str, hits: Sequence[Hit], rules: CutRules) -> list[str]:
    """The pieces that are left of a text. hits: by place."""
    pieces = []
    start = 0  # of the rest, which no cut has reached
    for hit in hits:
        if hit.start < start:
            continue
        left = _end_before(text, start, hit.start - rules.margin)
        pieces.append(text[start:left].strip())
        start = _end_behind(text, hit.end + rules.margin)
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if len(piece) > rules.min_piece]


def _end_before(text: str, start: int, place: int) -> int:
    """Behind the last sentence of ``text[start:]`` that ends at or before ``place``."""
    ends = (text.rfind(sign, start, max(start, place + 1)) for sign in SENTENCE_ENDS)
    return max(start, max(ends) + 1)


def _end_behind(text: str, place: int) -> int:
    """Behind the first sentence end at or behind ``place``; the end of the text if none."""
    ends = [found for sign in SENTENCE_ENDS if (found := text.find(sign, place)) >= 0]
    return min(ends) + 1 if ends else len(text)


@dataclass(frozen=True)
class CountPlan:
    """First pass: how often the corpus holds each n-gram. table: folder it was saved in."""

    key: str
    table: str

    def open(self) -> Callable[[Stretch], Counted]:
        table = NgramTable.load(Path(self.table))
        return lambda stretch: _count(stretch, self.key, table)


@dataclass(frozen=True)
class Counted:
    """Of one stretch. ngrams: one entry for every place where one was found."""

    end: Place
    size: int
    done: int
    records: int
    bad: list[BadRecord]
    ngrams: Counts


def _count(stretch: Stretch, key: str, table: NgramTable) -> Counted:
    chunk = stretch.chunk
    bad: list[BadRecord] = []
    found: list[int] = []
    for index in range(len(chunk.records)):
        try:
            page = open_page(chunk, index, key)
        except RecordError as error:
            bad.append(bad_record(chunk, index, error))
            continue
        found += [hit.ngram for hit in table.find(page.text)]
    ngrams = np.array(found, np.int64)
    return Counted(stretch.end, stretch.size, chunk.done, len(chunk.records), bad, ngrams)


class CountWriting:
    """Opens the file of a part: [M, 2] n-gram and number, of those that were found."""

    def __init__(self, reporting: Reporting) -> None:
        self._reporting = reporting

    @contextmanager
    def __call__(self, folder: Path) -> Iterator[_CountWriter]:
        with bad_lines(folder, self._reporting) as bad:
            writer = _CountWriter(bad)
            yield writer
        np.save(folder / COUNTS, np.array(sorted(writer.counts.items()), np.int64).reshape(-1, 2))


class _CountWriter:
    def __init__(self, bad: BadLines) -> None:
        self._bad = bad
        self.counts: dict[int, int] = {}
        self.facts: dict[str, Any] = {}

    def add(self, found: Counted) -> None:
        """Raises DataError at a bad record unless they are skipped."""
        self._bad.add(found.bad)
        for ngram in found.ngrams.tolist():
            self.counts[ngram] = self.counts.get(ngram, 0) + 1


def total_counts(folders: Sequence[Path], size: int) -> Counts:
    """[size] how often each n-gram was found in all parts."""
    counts = np.zeros(size, np.int64)
    for folder in folders:
        found = np.load(folder / COUNTS)
        counts[found[:, 0]] += found[:, 1]
    return counts


@dataclass(frozen=True)
class CutPlan:
    """Second pass. table, used: folders of the n-grams and of [N] which of them cut."""

    key: str
    id_key: str
    table: str
    used: str
    rules: CutRules

    def open(self) -> Callable[[Stretch], Sifted]:
        used = np.load(Path(self.used) / USED)
        judge = cut_judge(NgramTable.load(Path(self.table)), used, self.rules)
        return lambda stretch: sift(stretch, self.key, self.id_key, judge)


def cut_judge(table: NgramTable, used: npt.NDArray[np.bool_], rules: CutRules) -> Judge:
    """Untouched texts stay as they are; pieces get a field ``split_id``: the number of their
    record in its file and their own, from 0."""

    def judge(page: Page, number: int) -> Verdict:
        hits = [hit for hit in table.find(page.text) if used[hit.ngram]]
        if not hits:
            return Verdict((page.line(),))
        pieces = cut(page.text, hits, rules)
        detail = f"{len(hits)} matches, the first at character {hits[0].start}"
        if not pieces:
            return Verdict(reason=NOTHING_LEFT, detail=detail)
        if len(pieces) > rules.max_pieces:
            return Verdict(reason=PIECES, detail=f"{len(pieces)} pieces")
        lines = tuple(
            page.changed(piece, split_id=f"{number:010d}-{index:04d}")
            for index, piece in enumerate(pieces)
        )
        return Verdict(lines, changes=(CUT,))

    return judge
