"""The bytes of a dump, whatever it is packed with, and places to start reading again.

Dumps come as one long stream or (``multistream``) as many short ones behind each other, each
of which can be unpacked alone. The place of the last stream's start is remembered, so that a
resumed run need not unpack what it has already done.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mtk.errors import ConfigError, DataError

BLOCK = 64 << 10  # packed bytes at a time: what they unpack to is held in memory
PLAIN_BLOCK = 1 << 20
Start = tuple[int, int]  # byte on disk, byte of the unpacked dump


class BrokenStreamError(Exception):
    """The packed bytes end too soon or are damaged."""


class DumpStream:
    """A file's unpacked bytes from ``start`` on; the packing is told by its first bytes.

    end: of what was handed out so far, in the unpacked dump. disk: the same on disk. start:
    the last place at which unpacking could begin, before all that the last read gave; plain
    files begin anywhere. Raises DataError if the file cannot be opened, BrokenStreamError
    while reading.
    """

    def __init__(self, path: Path, start: Start = (0, 0)) -> None:
        try:
            self._raw = path.open("rb", buffering=0)
            self._new = _unpacker(self._raw.read(6))
            self._raw.seek(start[0])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        self.end = start[1]
        self.start = start
        self._stream: Any = None
        self._packed = b""

    def __enter__(self) -> DumpStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._raw.close()

    @property
    def disk(self) -> int:
        return self._raw.tell() - len(self._packed)

    def read(self) -> bytes:
        """The next bytes; none at the end."""
        try:
            data = self._raw.read(PLAIN_BLOCK) if self._new is None else self._unpack()
        except _broken() as error:
            raise BrokenStreamError(str(error).rstrip(".")) from error
        if self._new is None:
            self.start = self.end, self.end
        self.end += len(data)
        return data

    def _unpack(self) -> bytes:
        while True:
            self._packed = self._packed or self._raw.read(BLOCK)
            if not self._packed:
                if self._stream is not None:
                    raise EOFError("the file ends inside a compressed stream")
                return b""
            if self._stream is None:
                assert self._new is not None
                self._stream = self._new()
                self.start = self.disk, self.end
            data: bytes = self._stream.decompress(self._packed)
            if self._stream.eof:
                self._packed, self._stream = self._stream.unused_data, None
            else:
                self._packed = b""
            if data:
                return data


def _unpacker(magic: bytes) -> Callable[[], Any] | None:
    """What makes a decompressor for files that begin like this; None if they are plain."""
    if magic.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if magic.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError as error:
            message = "a zstd dump needs the package zstandard: pip install 'mtk[formats]'."
            raise ConfigError(message) from error
        decompressor: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj
        return decompressor
    return None


def _broken() -> tuple[type[Exception], ...]:
    """What decompressors raise."""
    known: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        import zstandard
    except ImportError:
        return known
    return (*known, zstandard.ZstdError)
