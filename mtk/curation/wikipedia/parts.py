"""A dump to finished parts on disk, from where an earlier run was killed."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mtk.artifacts.parts import Parts
from mtk.curation.wikipedia.dump import Place, read_pages
from mtk.curation.wikipedia.extract import Counts, Extracted, Extraction, extract
from mtk.data.workers import in_order
from mtk.errors import DataError
from mtk.log import Progress

RECORDS, DROPPED = "records", "dropped.jsonl"


@dataclass(frozen=True)
class PartRules:
    """pages: a part ends with the chunk that brings it there. listed: dropped pages of each
    reason that are listed, in the whole output."""

    pages: int
    listed: int
    skip_bad: bool


def extract_parts(
    files: Sequence[Path],
    plans: Sequence[Extraction],
    parts: Parts,
    rules: PartRules,
    *,
    workers: int,
    progress: Progress,
) -> Counts:
    """Bring ``parts`` to the end of the last file; the counts of all of them.

    Raises DataError where a file is broken, and at the first bad page unless
    ``rules.skip_bad``; WorkerError.
    """
    total = finished_counts(parts)
    place = Place.from_json(parts.facts[-1]["next"]) if len(parts) else Place(0, 0, 0, (0, 0))
    chunks = read_pages(files, [plan.site for plan in plans], place)
    tasks = ((plans[chunk.index], chunk) for chunk in chunks)
    with closing(in_order(extract, tasks, workers)) as extracted:
        for first in extracted:
            facts: dict[str, object] = {}
            with parts.grow(facts) as folder:
                part = _Part(folder, rules, Counter(total.dropped), progress)
                facts |= part.write(first, extracted)
            total.merge(parts.facts[-1])
    return total


def finished_counts(parts: Parts) -> Counts:
    counts = Counts()
    for facts in parts.facts:
        counts.merge(facts)
    return counts


def join_parts(parts: Parts, name: str, target: Path) -> int:
    """One file of those called ``name`` in every part; its size in bytes."""
    with target.open("wb") as stream:
        for index in range(len(parts)):
            with (parts.part(index) / name).open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
        return stream.tell()


class _Part:
    """One part being written. before: dropped pages of all parts before, by reason."""

    def __init__(
        self, folder: Path, rules: PartRules, before: Counter[str], progress: Progress
    ) -> None:
        self._folder, self._rules, self._progress = folder, rules, progress
        self._before = before
        self._counts = Counts()

    def write(self, first: Extracted, more: Iterator[Extracted]) -> dict[str, object]:
        """From ``first`` on until the part is full; its facts, as they are saved with it."""
        with (
            (self._folder / RECORDS).open("wb") as records,
            (self._folder / DROPPED).open("w", encoding="utf-8") as dropped,
        ):
            extracted: Extracted | None = first
            while extracted is not None:
                self._add(extracted, records, dropped)
                after = extracted.after
                full = self._counts.pages >= self._rules.pages
                extracted = None if full else next(more, None)
        return {**self._counts.facts(), "next": after.to_json()}

    def _add(self, extracted: Extracted, records: IO[bytes], dropped: IO[str]) -> None:
        for bad in extracted.bad:
            if not self._rules.skip_bad:
                title = f", {bad.title!r}" if bad.title else ""
                raise DataError(
                    f"{bad.file}, page {bad.page} (byte {bad.byte} uncompressed{title}): "
                    f"{bad.reason}: {bad.detail}. Correct it, or leave such pages out with "
                    f"--on-bad-page skip."
                )
        records.write(extracted.records)
        for page in extracted.dropped:
            self._before[page.reason] += 1
            if self._before[page.reason] <= self._rules.listed:
                dropped.write(page.line())
        self._counts.add(extracted)
        self._progress.advance(extracted.done / 1e6, articles=f"{self._counts.kept:,}")
