"""The items of one large JSON array, found one after another in constant memory."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path

from mtk.errors import DataError

BLOCK = 1 << 20
_SPACE = " \t\r\n"


def looks_like_array(stream: io.BufferedReader) -> bool:
    """Whether the first character that is no white space is ``[`` (consumes nothing)."""
    try:
        start = stream.peek(4096)[:4096]
    except Exception:  # a broken stream is reported when it is read
        return False
    return start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def array_items(stream: io.BufferedReader, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte where it starts, its JSON) for every item.

    Raises DataError at the byte where the array is broken: the items behind it cannot be
    told apart, so they can not be skipped one by one.
    """
    return _ArrayReader(stream, path).items()


class _ArrayReader:
    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self._stream, self._path = stream, path
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0  # in characters of the buffer
        self._byte = 0  # of the character at self._at
        self._started = self._ended = False

    def items(self) -> Iterator[tuple[int, int, bytes]]:
        self._expect("[")
        number = 0
        while self._next() != "]":
            if number:
                self._expect(",")
                self._next()
            number += 1
            start, end = self._byte, self._item_end(number)
            content = self._buffer[self._at : end].encode()
            self._advance(end)
            yield number, start, content
        self._expect("]")
        if self._next(allow_end=True):
            raise self._broken(f"text follows the array: {self._buffer[self._at :][:20]!r}")

    def _fill(self) -> bool:
        block = self._stream.read(max(BLOCK, len(self._buffer) - self._at))
        if not self._started and block.startswith(codecs.BOM_UTF8):
            self._byte = len(codecs.BOM_UTF8)
        self._started = True
        self._ended = not block
        try:
            text = self._utf8.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise self._broken(f"invalid UTF-8 after this place ({error.reason})") from error
        self._buffer = self._buffer[self._at :] + text
        self._at = 0
        return not self._ended

    def _advance(self, to: int) -> None:
        self._byte += len(self._buffer[self._at : to].encode())
        self._at = to

    def _next(self, *, allow_end: bool = False) -> str:
        """The next character that is no white space, without passing it."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _SPACE:
                    return self._buffer[self._at]
                self._advance(self._at + 1)
            if not self._fill():
                if allow_end:
                    return ""
                raise self._broken("the array is not closed")

    def _expect(self, character: str) -> None:
        found = self._next()
        if found != character:
            raise self._broken(f"expected {character!r}, found {found!r}")
        self._advance(self._at + 1)

    def _item_end(self, number: int) -> int:
        while True:
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._at)
                # A number at the end of the buffer may go on in the next block.
                if end < len(self._buffer) or not self._fill():
                    return end
            except RecursionError as error:
                raise self._broken(f"item {number} is nested too deep") from error
            except json.JSONDecodeError as error:
                unfinished = (
                    error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - 16
                )
                if not unfinished or not self._fill():
                    raise self._broken(f"item {number}: {error.msg}") from error

    def _broken(self, what: str) -> DataError:
        return DataError(
            f"{self._path}, byte {self._byte}: {what}. A broken array cannot be skipped item by "
            f"item; repair it, or write one object a line (.jsonl)."
        )
