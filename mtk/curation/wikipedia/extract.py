"""A chunk of raw pages to JSON lines of clean articles, and the reasons why others are not."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from mtk.curation.wikipedia.dump import PageChunk, Place
from mtk.curation.wikipedia.filter import PageRules, why_dropped
from mtk.curation.wikipedia.page import Page, PageError, parse_page
from mtk.curation.wikipedia.site import Site
from mtk.curation.wikipedia.text import TextRules, plain_text

PACKINGS = ("", ".gz", ".zst")


@dataclass(frozen=True)
class Extraction:
    """What to do with the pages of one file. packing: of the records, see PACKINGS."""

    site: Site
    pages: PageRules
    text: TextRules
    min_characters: int = 0
    revision: bool = False
    packing: str = ""

    def of(self, page: Page) -> tuple[dict[str, str] | None, str]:
        """The record of a page, or None and why there is none. Raises PageError."""
        reason = why_dropped(page, self.site, self.pages)
        if reason is not None:
            return None, reason
        try:
            text = plain_text(page.text, page.title, self.text)
        except (RecursionError, ValueError, LookupError, TypeError) as error:
            # A fault of this program, not of the page; it is told like one.
            raise PageError("cannot be cleaned", repr(error), page) from error
        if not text:
            return None, "empty"
        if len(text) < self.min_characters:
            return None, "short"
        record = {"id": page.id, "url": self.site.url(page.title), "title": page.title}
        if self.revision:
            record |= {"revision": page.revision, "timestamp": page.timestamp}
        return record | {"text": text}, ""


@dataclass(frozen=True)
class DroppedPage:
    """page: number in the file, from 1. byte: where it begins in the unpacked file."""

    file: str
    page: int
    byte: int
    id: str
    title: str
    reason: str
    detail: str = ""

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Extracted:
    """records: JSON lines, packed. bad: pages that could not be read; they are among the
    dropped ones."""

    records: bytes
    kept: int
    text_bytes: int
    characters: int
    dropped: tuple[DroppedPage, ...]
    bad: tuple[DroppedPage, ...]
    pages: int
    after: Place
    done: int


@dataclass
class _Gathered:
    lines: list[str] = field(default_factory=list)
    characters: int = 0
    text_bytes: int = 0
    dropped: list[DroppedPage] = field(default_factory=list)
    bad: list[DroppedPage] = field(default_factory=list)


def extract(task: tuple[Extraction, PageChunk]) -> Extracted:
    """Picklable work for a pool."""
    plan, chunk = task
    found = _Gathered()
    for index, xml in enumerate(chunk.pages):
        _add(found, plan, chunk, index, xml)
    return Extracted(
        records=packed("".join(found.lines).encode(), plan.packing),
        kept=len(found.lines),
        text_bytes=found.text_bytes,
        characters=found.characters,
        dropped=tuple(found.dropped),
        bad=tuple(found.bad),
        pages=len(chunk.pages),
        after=chunk.after,
        done=chunk.done,
    )


def _add(found: _Gathered, plan: Extraction, chunk: PageChunk, index: int, xml: bytes) -> None:
    place = (chunk.file, chunk.first + index, chunk.bytes[index])
    try:
        page = parse_page(xml)
        record, reason = plan.of(page)
    except PageError as error:
        where = (*place[:2], place[2] + error.byte, error.page.id, error.page.title)
        bad = DroppedPage(*where, error.reason, error.detail)
        found.dropped.append(bad)
        found.bad.append(bad)
        return
    if record is None:
        found.dropped.append(DroppedPage(*place, page.id, page.title, reason))
        return
    found.lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    found.characters += len(record["text"])
    found.text_bytes += len(record["text"].encode())


def packed(data: bytes, packing: str) -> bytes:
    """A gzip member or zstd frame of its own, which readers take as one stream with those
    around it: so workers pack, and no byte depends on who did what."""
    if not data or not packing:
        return data
    if packing == ".gz":
        return gzip.compress(data, 6, mtime=0)
    import zstandard

    compressed: bytes = zstandard.ZstdCompressor(level=6).compress(data)
    return compressed


@dataclass
class Counts:
    """What a part, or the whole, came to. dropped: by reason."""

    pages: int = 0
    kept: int = 0
    text_bytes: int = 0
    characters: int = 0
    disk: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, extracted: Extracted) -> None:
        self.pages += extracted.pages
        self.kept += extracted.kept
        self.text_bytes += extracted.text_bytes
        self.characters += extracted.characters
        self.disk += extracted.done
        self.dropped.update(page.reason for page in extracted.dropped)

    def merge(self, facts: dict[str, Any]) -> None:
        """Add those of a finished part, as :meth:`facts` gave them."""
        for name in ("pages", "kept", "text_bytes", "characters", "disk"):
            setattr(self, name, getattr(self, name) + facts[name])
        self.dropped.update(facts["dropped"])

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "dropped": dict(self.dropped)}
