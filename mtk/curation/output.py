"""Lines of a part, compressed as the output's name says, and parts joined to one file.

Every part is a gzip member or a zstd frame of its own; both formats read such files as one.
"""

from __future__ import annotations

import gzip
import io
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mtk.errors import ConfigError

GZIP_LEVEL, ZSTD_LEVEL = 6, 3


class Sink(Protocol):
    def write(self, data: bytes, /) -> Any: ...


@contextmanager
def packed(path: Path, suffix: str) -> Iterator[Sink]:
    """A file to write to, compressed for a ``suffix`` of ".gz" or ".zst"; the same bytes give
    the same file."""
    with path.open("wb") as raw:
        if suffix == ".gz":
            # No name and no time of its own, which would differ between runs.
            with gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as stream:
                yield stream
        elif suffix == ".zst":
            with _zstandard().ZstdCompressor(ZSTD_LEVEL).stream_writer(raw) as stream:
                yield stream
        else:
            with io.BufferedWriter(raw, 1 << 20) as stream:
                yield stream


def compression(output: str) -> str:
    """ ".gz", ".zst" or ""."""
    suffix = Path(output).suffix
    return suffix if suffix in (".gz", ".zst") else ""


def require_compressor(output: str) -> None:
    """Raises ConfigError where the output's compression is not installed."""
    if compression(output) == ".zst":
        _zstandard()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        message = ".zst output needs the package zstandard: pip install 'mtk[formats]'."
        raise ConfigError(message) from error
    return zstandard


def join_files(parts: Iterable[Path], target: Path, *, optional: bool = False) -> None:
    """One file of all parts that exist; with ``optional`` none at all if none does."""
    found = [path for path in parts if path.is_file() and path.stat().st_size]
    if optional and not found:
        return
    with target.open("wb") as stream:
        for path in found:
            with path.open("rb") as part:
                shutil.copyfileobj(part, stream, 1 << 20)
