"""A dump as chunks of raw pages, read forward in constant memory; workers parse them.

In a dump every ``<`` of a page's text is written as ``&lt;``, so ``</page>`` ends a page and
nothing else: pages are cut without parsing, at the speed of the decompressor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from mtk.curation.wikipedia.site import Site
from mtk.curation.wikipedia.stream import BrokenStreamError, DumpStream, Start
from mtk.errors import DataError

CHUNK_PAGES = 200
CHUNK_BYTES = 512 << 10
LARGEST_PAGE = 512 << 20
_END = b"</page>"
_BEFORE_PAGE = re.compile(rb"(?:\s|<!--.*?-->)*(?=<page[\s>])", re.DOTALL)
_AFTER_PAGES = re.compile(rb"(?:\s|<!--.*?-->)*</mediawiki\s*>\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """Where reading goes on. file: by its index. page: how many of the file's pages lie
    before. byte: of the unpacked file. start: see :class:`DumpStream`."""

    file: int
    page: int
    byte: int
    start: Start

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Place:
        disk, byte = value["start"]
        return cls(value["file"], value["page"], value["byte"], (disk, byte))


@dataclass(frozen=True)
class PageChunk:
    """Consecutive pages of one file.

    index: of the file. pages: ``<page>...</page>``. first: number of the first one in its
    file, from 1. bytes: where each begins in the unpacked file. after: the place behind the
    last one. done: bytes on disk since the chunk before.
    """

    file: str
    index: int
    pages: tuple[bytes, ...]
    first: int
    bytes: tuple[int, ...]
    after: Place
    done: int


def read_pages(files: Sequence[Path], sites: Sequence[Site], place: Place) -> Iterator[PageChunk]:
    """All pages from ``place`` on. Raises DataError with page and byte where a file is broken
    or ends too soon."""
    for index in range(place.file, len(files)):
        if index > place.file or not place.page:
            place = first_place(index, sites[index])
        with DumpStream(files[index], place.start) as stream:
            yield from _chunks(files[index], stream, place)


def first_place(index: int, site: Site) -> Place:
    return Place(index, 0, site.head_bytes, (0, 0))


def _chunks(path: Path, stream: DumpStream, place: Place) -> Iterator[PageChunk]:
    pages: list[bytes] = []
    starts: list[int] = []
    size, number, disk = 0, place.page, place.start[0]
    for start, page in _Pages(path, stream, place):
        pages.append(page)
        starts.append(start)
        size += len(page)
        number += 1
        if size >= CHUNK_BYTES or len(pages) >= CHUNK_PAGES:
            end = start + len(page)
            after = Place(place.file, number, end, stream.start)
            first = number - len(pages) + 1
            done, disk = stream.disk - disk, stream.disk
            yield PageChunk(str(path), place.file, tuple(pages), first, tuple(starts), after, done)
            pages, starts, size = [], [], 0
    after = Place(place.file + 1, 0, 0, (0, 0))
    first = number - len(pages) + 1
    done = path.stat().st_size - disk
    yield PageChunk(str(path), place.file, tuple(pages), first, tuple(starts), after, done)


class _Pages:
    """(start, content) of every page behind ``place``."""

    def __init__(self, path: Path, stream: DumpStream, place: Place) -> None:
        self._path, self._stream, self._place = path, stream, place
        self._number = place.page

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        buffer = self._skip_to(self._place.byte)
        base, begin, searched = self._place.byte, 0, 0
        while True:
            end = buffer.find(_END, searched)
            if end >= 0:
                end += len(_END)
                start = self._start(buffer, begin, base)
                self._number += 1
                yield base + start, bytes(buffer[start:end])
                begin = searched = end
                continue
            del buffer[:begin]
            base, begin = base + begin, 0
            searched = max(0, len(buffer) - len(_END) + 1)
            if len(buffer) > LARGEST_PAGE:
                self._fail(base, f"it does not end within {LARGEST_PAGE >> 20} MiB")
            data = self._read(base)
            if not data:
                break
            buffer += data
        if not _AFTER_PAGES.match(buffer):
            self._fail(base + len(buffer), "the dump is cut short: </mediawiki> is missing")

    def _skip_to(self, byte: int) -> bytearray:
        while self._stream.end <= byte:
            data = self._read(self._stream.end)
            if not data:
                break
            if self._stream.end > byte:
                return bytearray(data[byte - self._stream.end :])
        return bytearray()

    def _read(self, byte: int) -> bytes:
        try:
            return self._stream.read()
        except BrokenStreamError as error:
            self._fail(byte, f"the stream is broken: {error}", after=True)

    def _start(self, buffer: bytearray, begin: int, base: int) -> int:
        found = _BEFORE_PAGE.match(buffer, begin)
        if found is None:
            near = bytes(buffer[begin : begin + 200]).lstrip()
            begin += len(buffer[begin : begin + 200]) - len(near)
            self._fail(base + begin, f"{near[:40]!r} stands where <page> or the end is expected")
        return found.end()

    def _fail(self, byte: int, what: str, *, after: bool = False) -> NoReturn:
        where = f"after page {self._number}" if after else f"page {self._number + 1}"
        raise DataError(
            f"{self._path}, {where} (byte {byte} uncompressed): {what}. What follows cannot be "
            f"counted, so it is never skipped; restore the file."
        )
