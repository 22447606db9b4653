"""Corpus files as chunks of raw records, read forward once in constant memory.

``.jsonl``: an object a line. ``.json``: the same, or one array of objects. ``.txt``: plain
text, see ``text_documents``. Each may be compressed (``.gz``, ``.zst``). ``.parquet``:
rows. Records stay bytes here; workers parse them.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtk.artifacts.manifest import MARKER
from mtk.data.json_array import array_items, looks_like_array
from mtk.errors import ConfigError, DataError

TextDocuments = Literal["file", "blank-line", "line"]
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSED = (".gz", ".zst")
REPORTS = (".bad_lines.jsonl", ".punkt.json")  # of preprocess, beside its datasets
CHUNK_BYTES = 512 << 10
CHUNK_RECORDS = 1000
LARGEST_TEXT = 256 << 20
ZSTD_BLOCK = 16 << 10  # compressed bytes at a time: what they unpack to is held in memory
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file.

    unit: what is counted ("line", "item" of an array, "row", "document"). numbers: of each
    record, from 1. starts: byte in the uncompressed file where each begins (-1 for rows).
    plain: the records are texts, not JSON. done: share of the file's bytes on disk read
    since the chunk before, in bytes.
    """

    file: str
    unit: str
    records: tuple[bytes, ...]
    numbers: tuple[int, ...]
    starts: tuple[int, ...]
    plain: bool
    done: int


Record = tuple[int, int, bytes]  # number, start, content


def expand_inputs(
    patterns: Sequence[str],
    output_prefix: str | None = None,
    option: str = "--input",
    *,
    any_format: bool = False,
) -> list[Path]:
    """The files that paths and globs name, each once; matches of a glob sorted by name.

    A glob matches neither manifests nor what an earlier run left under ``output_prefix``:
    the same command has the same input again. Raises DataError for a pattern without a
    match, a folder, or (unless ``any_format``) an unknown suffix.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        found = [path]
        if not path.exists():
            # Unlike Path.glob it takes absolute patterns too.
            names = glob.glob(pattern, recursive=True)  # noqa: PTH207
            inputs = [name for name in sorted(names) if not _is_output(name, output_prefix)]
            found = [Path(name) for name in inputs]
        if path.is_dir():
            suffix = "" if any_format else ".jsonl"
            raise DataError(f"{pattern} is a folder. Name its files, e.g. '{path}/*{suffix}'.")
        found = [file for file in found if not file.is_dir()]
        if not found:
            raise DataError(f"{option} {pattern}: no such file, and no file matches it as a glob.")
        files.update(dict.fromkeys(found))
    for file in () if any_format else files:
        file_format(file)
    return list(files)


def _is_output(name: str, output_prefix: str | None) -> bool:
    if name.endswith(MARKER):
        return True
    reports = [f"{output_prefix}{end}" for end in REPORTS] if output_prefix else []
    return Path(name).resolve() in [Path(report).resolve() for report in reports]


def file_format(path: Path) -> tuple[str, str]:
    """(suffix of the content, suffix of the compression or ""). Raises DataError."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    content = suffixes[-1] if suffixes else ""
    if content not in SUFFIXES or (packed and content == ".parquet"):
        raise DataError(
            f"{path}: the format of {''.join(path.suffixes[-2:]) or 'a file without suffix'} is "
            f"not known. Known are {' '.join(SUFFIXES)}, the first three also with "
            f"{' or '.join(COMPRESSED)}."
        )
    return content, packed


def read_chunks(
    files: Sequence[Path], keys: Sequence[str], text_documents: TextDocuments
) -> Iterator[Chunk]:
    """All records of all files in order. Raises DataError for a file that cannot be read."""
    for path in files:
        content, packed = file_format(path)
        if content == ".parquet":
            rows = _rows(path, keys)
            yield from _chunks(path, "row", rows, lambda: 0, plain=False)
            continue
        with _opened(path, packed) as (stream, position):
            if content == ".txt":
                yield from _text_chunks(path, stream, position, text_documents)
            elif content == ".json" and looks_like_array(stream):
                items = _guarded(array_items(stream, path), path, "item")
                yield from _chunks(path, "item", items, position, plain=False)
            else:
                lines = _guarded(_lines(stream), path, "line")
                yield from _chunks(path, "line", lines, position, plain=False)


def _chunks(
    path: Path, unit: str, records: Iterator[Record], position: Any, *, plain: bool
) -> Iterator[Chunk]:
    waiting: list[Record] = []
    size = before = 0
    for record in records:
        waiting.append(record)
        size += len(record[2])
        if size >= CHUNK_BYTES or len(waiting) >= CHUNK_RECORDS:
            now = position()
            yield _chunk(path, unit, waiting, plain, now - before)
            waiting, size, before = [], 0, now
    if waiting:
        yield _chunk(path, unit, waiting, plain, path.stat().st_size - before)


def _chunk(path: Path, unit: str, records: list[Record], plain: bool, done: int) -> Chunk:
    numbers, starts, contents = zip(*records, strict=True)
    return Chunk(str(path), unit, contents, numbers, starts, plain, done)


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[tuple[io.BufferedReader, Any]]:
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


def _guarded(records: Iterator[Record], path: Path, unit: str) -> Iterator[Record]:
    """Turn the failures of a broken or unreadable stream into a DataError with the place."""
    number = end = 0
    try:
        for record in records:
            number, end = record[0], record[1] + len(record[2])
            yield record
    except (EOFError, zlib.error, OSError, _zstd_error()) as error:
        raise DataError(
            f"{path}, after {unit} {number} (byte {end} uncompressed): the stream is broken: "
            f"{str(error).rstrip('.')}. What follows cannot be counted, so it is never skipped; "
            f"restore the file."
        ) from error


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    found: type[Exception] = zstandard.ZstdError
    return found


def _lines(stream: io.BufferedReader) -> Iterator[Record]:
    start = 0
    for number, line in enumerate(stream, start=1):
        mark = len(BOM) if number == 1 and line.startswith(BOM) else 0
        yield number, start + mark, line[mark:]
        start += len(line)


def _text_chunks(
    path: Path, stream: io.BufferedReader, position: Any, text_documents: TextDocuments
) -> Iterator[Chunk]:
    if text_documents == "file":
        records = _guarded(_whole(stream, path), path, "document")
    else:
        lines = _guarded(_lines(stream), path, "line")
        records = _paragraphs(lines) if text_documents == "blank-line" else _filled_lines(lines)
    yield from _chunks(path, "line", records, position, plain=True)


def _whole(stream: io.BufferedReader, path: Path) -> Iterator[Record]:
    text = stream.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise DataError(
            f"{path} is larger than {LARGEST_TEXT >> 20} MiB, too much for one document. Say "
            f"where documents end with --text-documents blank-line or line."
        )
    mark = len(BOM) if text.startswith(BOM) else 0
    yield 1, mark, text[mark:]


def _filled_lines(lines: Iterator[Record]) -> Iterator[Record]:
    for number, start, line in lines:
        if line.strip():
            yield number, start, line.rstrip(b"\r\n")


def _paragraphs(lines: Iterator[Record]) -> Iterator[Record]:
    parts: list[bytes] = []
    first = (1, 0)
    for number, start, line in lines:
        if line.strip():
            first = first if parts else (number, start)
            parts.append(line)
        elif parts:
            yield (*first, b"".join(parts).rstrip(b"\r\n"))
            parts = []
    if parts:
        yield (*first, b"".join(parts).rstrip(b"\r\n"))


def _plain(value: object) -> str:
    """JSON for what it does not know. Columns of text are often stored as plain bytes; what
    is not UTF-8 becomes lone surrogates, which are refused with the record."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def _rows(path: Path, keys: Sequence[str]) -> Iterator[Record]:
    """Rows of a parquet file as JSON objects with the wanted columns."""
    import json

    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        message = ".parquet input needs the package pyarrow: pip install 'mtk[formats]'."
        raise ConfigError(message) from error
    try:
        with parquet.ParquetFile(path) as file:
            missing = [key for key in keys if key not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path} has no column {missing[0]!r}; it has "
                    f"{', '.join(file.schema_arrow.names)}. Correct --json-keys."
                )
            number = 0
            for batch in file.iter_batches(batch_size=CHUNK_RECORDS, columns=list(keys)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, -1, json.dumps(row, default=_plain).encode()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}.") from error
