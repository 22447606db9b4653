"""The lines of a stream as records, each with its number and place, in bounded memory."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator

BOM = codecs.BOM_UTF8
BLOCK = 1 << 20
Record = tuple[int, int, bytes]  # number, start, content


class Overlong(bytes):
    """Stands for a record too long to be held. size: bytes it has, limit: that it may have."""

    size: int
    limit: int

    @classmethod
    def of(cls, size: int, limit: int) -> Overlong:
        made = cls()
        made.size, made.limit = size, limit
        return made


def lines(
    stream: io.BufferedReader, limit: int, start: int = 0, number: int = 1
) -> Iterator[Record]:
    """All lines from byte ``start`` (uncompressed) on, which is where line ``number`` begins.

    A line of more than ``limit`` bytes becomes an :class:`Overlong`. A byte order mark at the
    beginning of the file is no part of its first line.
    """
    _skip(stream, start)
    while line := stream.readline(limit + 1):
        mark = len(BOM) if start == 0 and line.startswith(BOM) else 0
        size = len(line)
        if size > limit and not (size == limit + 1 and line.endswith(b"\n")):
            size += _rest_of_line(stream)
            line = Overlong.of(size, limit)
        yield number, start + mark, line[mark:] if mark else line
        start += size
        number += 1


def _skip(stream: io.BufferedReader, size: int) -> None:
    if stream.seekable():
        stream.seek(size)
        return
    while size:
        size -= len(stream.read(min(size, 1 << 20)) or b"\0" * size)


def _rest_of_line(stream: io.BufferedReader) -> int:
    """Bytes up to the end of the line, not kept."""
    size = 0
    while block := stream.readline(1 << 20):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return size


def filled_lines(all_lines: Iterator[Record]) -> Iterator[Record]:
    for number, start, line in all_lines:
        if isinstance(line, Overlong):
            yield number, start, line
        elif line.strip():
            yield number, start, line.rstrip(b"\r\n")


def paragraphs(all_lines: Iterator[Record], limit: int) -> Iterator[Record]:
    parts: list[bytes] = []
    first, size = (1, 0), 0
    for number, start, line in all_lines:
        own = line.size if isinstance(line, Overlong) else len(line)
        if isinstance(line, Overlong) or line.strip():
            first, size = (first, size + own) if size else ((number, start), own)
            if size <= limit:
                parts.append(line)
            else:
                parts.clear()
        elif size:
            yield (*first, _paragraph(parts, size, limit))
            parts, size = [], 0
    if size:
        yield (*first, _paragraph(parts, size, limit))


def _paragraph(parts: list[bytes], size: int, limit: int) -> bytes:
    return b"".join(parts).rstrip(b"\r\n") if size <= limit else Overlong.of(size, limit)
