"""Keeping, changing or dropping every page by itself, and telling what was dropped and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtk.curation.output import Sink, packed
from mtk.curation.pages import Page, Place, Stretch, name_of, open_page
from mtk.data.records import BadRecord, RecordError, bad_record, refusal

KEPT, DROPPED, BAD = "kept", "dropped.jsonl", "bad_lines.jsonl"
LISTED = 10_000  # bad records, as mtk preprocess lists them


@dataclass(frozen=True)
class Verdict:
    """What becomes of a page.

    lines: what is written of it; none if it is dropped, with ``reason`` (a short constant to
    count by) and ``detail``. changes: what was done to it, to count by. digest: of what must
    not come twice.
    """

    lines: tuple[bytes, ...] = ()
    reason: str = ""
    detail: str = ""
    changes: tuple[str, ...] = ()
    digest: int | None = None


Judge = Callable[[Page, int], Verdict]  # the number is that of the record in its file


@dataclass(frozen=True)
class Dropped:
    """A page that was left out. id: see :func:`mtk.curation.pages.name_of`."""

    id: str
    file: str
    number: int
    reason: str
    detail: str


@dataclass
class Sifted:
    """Of one stretch: what to write, and what was left out. digests: of what must not come
    twice, one for each entry of ``kept``, with the page's text and number."""

    end: Place
    size: int
    done: int
    records: int
    file: str
    kept: list[tuple[bytes, ...]] = field(default_factory=list)
    sources: list[tuple[str, int]] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)


def sift(stretch: Stretch, key: str, id_key: str, judge: Judge) -> Sifted:
    """Judge every page of a stretch."""
    chunk = stretch.chunk
    found = Sifted(stretch.end, stretch.size, chunk.done, len(chunk.records), chunk.file)
    for index, number in enumerate(chunk.numbers):
        try:
            page = open_page(chunk, index, key)
        except RecordError as error:
            found.bad.append(bad_record(chunk, index, error))
            continue
        verdict = judge(page, number)
        found.changes.update(verdict.changes)
        if verdict.lines:
            found.kept.append(verdict.lines)
            if verdict.digest is not None:
                found.digests.append(verdict.digest)
                found.sources.append((page.text, number))
        else:
            name = name_of(page, id_key, f"{Path(chunk.file).name}:{number}")
            found.dropped.append(Dropped(name, chunk.file, number, verdict.reason, verdict.detail))
    return found


@dataclass(frozen=True)
class Reporting:
    """What a step says about pages it leaves out. suffix: compression of the output."""

    suffix: str
    list_dropped: bool
    skip_bad: bool


class BadLines:
    """The list of a part's bad records. by_reason: their numbers."""

    def __init__(self, stream: Sink, *, skip: bool) -> None:
        self._stream, self._skip = stream, skip
        self.by_reason: Counter[str] = Counter()

    def add(self, found: Sequence[BadRecord]) -> None:
        """Raises DataError at a bad record unless they are skipped."""
        for bad in found:
            if not self._skip:
                raise refusal(bad)
            self.by_reason[bad.reason] += 1
            if self.by_reason.total() <= LISTED:
                self._stream.write(json.dumps(asdict(bad)).encode() + b"\n")


class DroppedList:
    """The list of what a part leaves out, if one is wanted. by_reason: its numbers."""

    def __init__(self, stream: Sink | None) -> None:
        self._stream = stream
        self.by_reason: Counter[str] = Counter()

    def add(self, found: Iterable[Dropped]) -> None:
        for dropped in found:
            self.by_reason[dropped.reason] += 1
            if self._stream is not None:
                line = json.dumps(asdict(dropped), ensure_ascii=False)
                self._stream.write(line.encode(errors="replace") + b"\n")


class SiftedWriter:
    """The files of one part: lines kept, records dropped, bad records. facts: counts."""

    def __init__(self, kept: Sink, dropped: DroppedList, bad: BadLines) -> None:
        self._kept, self._dropped, self._bad = kept, dropped, bad
        self._counts: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "counts": dict(self._counts),
            "dropped": dict(self._dropped.by_reason),
            "bad": dict(self._bad.by_reason),
            "changes": dict(self._changes),
        }

    def add(self, found: Sifted) -> None:
        """Raises DataError at a bad record unless they are skipped."""
        self._bad.add(found.bad)
        self._dropped.add(found.dropped)
        lines = [line for page in found.kept for line in page]
        self._changes.update(found.changes)
        self._counts["records"] += found.records
        self._counts["bytes_read"] += found.size
        self._counts["pages_kept"] += len(found.kept)
        self._counts["records_written"] += len(lines)
        if lines:
            data = b"\n".join(lines) + b"\n"
            self._counts["bytes_written"] += len(data)
            self._kept.write(data)


@contextmanager
def sifted_writer(folder: Path, reporting: Reporting) -> Iterator[SiftedWriter]:
    """Opens the files of a part."""
    with ExitStack() as stack:
        kept = stack.enter_context(packed(folder / KEPT, reporting.suffix))
        dropped = stack.enter_context(dropped_list(folder, reporting))
        bad = stack.enter_context(bad_lines(folder, reporting))
        yield SiftedWriter(kept, dropped, bad)


@contextmanager
def dropped_list(folder: Path, reporting: Reporting) -> Iterator[DroppedList]:
    if not reporting.list_dropped:
        yield DroppedList(None)
        return
    with (folder / DROPPED).open("wb") as stream:
        yield DroppedList(stream)


@contextmanager
def bad_lines(folder: Path, reporting: Reporting) -> Iterator[BadLines]:
    with (folder / BAD).open("wb") as stream:
        yield BadLines(stream, skip=reporting.skip_bad)
