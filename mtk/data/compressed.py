"""Files of a corpus opened for reading, unpacked on the way (``.gz``, ``.zst``)."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtk.errors import ConfigError, DataError

ZSTD_BLOCK = 16 << 10  # compressed bytes at a time: what they unpack to is held in memory


@contextmanager
def opened(path: Path, packed: str) -> Iterator[tuple[io.BufferedReader, Any]]:
    """The uncompressed stream, and a function that tells the position on disk."""
    try:
        raw = path.open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    with raw:
        stream: io.RawIOBase = raw
        if packed == ".gz":
            stream = _Available(gzip.GzipFile(fileobj=raw))
        elif packed == ".zst":
            stream = _Frames(raw)
        yield io.BufferedReader(stream, 1 << 20), lambda: os.lseek(raw.fileno(), 0, os.SEEK_CUR)


class _Available(io.RawIOBase):
    """Hands on what a decompressor has at once, so that all before a break is delivered."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: bytes = self._stream.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Frames(io.RawIOBase):
    """The zstd frames of a file as one stream, as the zstd tool reads them.

    Raises EOFError for a file that ends inside a frame, which the library's own reader
    takes for the end of the data.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self._raw, self._new = raw, _zstandard().ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._inside = False  # a frame has begun and not ended
        self._packed = self._data = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data and self._more():
            self._data = self._frame.decompress(self._packed)
            self._inside = not self._frame.eof
            self._packed = self._frame.unused_data if self._frame.eof else b""
        size = min(len(buffer), len(self._data))
        buffer[:size], self._data = self._data[:size], self._data[size:]
        return size

    def _more(self) -> bool:
        """Whether there is something to decompress, by a frame that has not ended."""
        self._packed = self._packed or self._raw.read(ZSTD_BLOCK) or b""
        if not self._packed and self._inside:
            raise EOFError("the file ends inside a zstd frame")
        if self._frame.eof:
            self._frame = self._new()
        return bool(self._packed)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        message = ".zst input needs the package zstandard: pip install 'mtk[formats]'."
        raise ConfigError(message) from error
    return zstandard


def zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    found: type[Exception] = zstandard.ZstdError
    return found
