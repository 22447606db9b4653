"""Corpus files as chunks of raw records, read forward once in constant memory.

``.jsonl``: an object a line. ``.json``: the same, or one array of objects. ``.txt``: plain
text, see ``text_documents``. Each may be compressed (``.gz``, ``.zst``). ``.parquet``:
rows. Records stay bytes here; workers parse them.
"""

from __future__ import annotations

import glob
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any, Literal

from mtk.artifacts.manifest import MARKER
from mtk.data.compressed import opened, zstd_error
from mtk.data.json_array import array_items, looks_like_array
from mtk.data.lines import BOM, Record, filled_lines, lines, paragraphs
from mtk.errors import ConfigError, DataError

TextDocuments = Literal["file", "blank-line", "line"]
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSED = (".gz", ".zst")
REPORTS = (".bad_lines.jsonl", ".punkt.json")  # of preprocess, beside its datasets
CHUNK_BYTES = 512 << 10
CHUNK_RECORDS = 1000
LARGEST_TEXT = 256 << 20


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

    @property
    def end(self) -> Place:
        """Its last record: what was read up to here."""
        return Place(self.file, self.numbers[-1], self.starts[-1])


@dataclass(frozen=True)
class Place:
    """A record of a file: number from 1, start in bytes uncompressed (-1 for rows)."""

    file: str
    number: int
    start: int


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
    files: Sequence[Path],
    keys: Sequence[str],
    text_documents: TextDocuments,
    *,
    limit: int = LARGEST_TEXT,
    after: Place | None = None,
) -> Iterator[Chunk]:
    """All records of all files in order, or those behind the record at ``after``.

    limit: bytes of a line; a longer one becomes an :class:`Overlong`. Raises DataError for a
    file that cannot be read.
    """
    names = [str(path) for path in files]
    first = names.index(after.file) if after else 0
    for path in files[first:]:
        begin = after if after is not None and str(path) == after.file else None
        yield from _file_chunks(path, keys, text_documents, limit, begin)


def _file_chunks(
    path: Path,
    keys: Sequence[str],
    text_documents: TextDocuments,
    limit: int,
    after: Place | None,
) -> Iterator[Chunk]:
    content, packed = file_format(path)
    if content == ".parquet":
        rows = _behind(_rows(path, keys), after)
        yield from _chunks(path, "row", rows, lambda: 0, plain=False)
        return
    with opened(path, packed) as (stream, position):
        if content == ".txt" and text_documents == "file":
            whole = _behind(_guarded(_whole(stream, path), path, "document"), after)
            yield from _chunks(path, "line", whole, position, plain=True)
        elif content == ".json" and looks_like_array(stream):
            items = _behind(_guarded(array_items(stream, path), path, "item"), after)
            yield from _chunks(path, "item", items, position, plain=False)
        else:
            begin = (after.start, after.number) if after else (0, 1)
            records = _guarded(lines(stream, limit, *begin), path, "line")
            if content == ".txt":
                blank = text_documents == "blank-line"
                records = paragraphs(records, limit) if blank else filled_lines(records)
            plain = content == ".txt"
            yield from _chunks(path, "line", _behind(records, after), position, plain=plain)


def _behind(records: Iterator[Record], after: Place | None) -> Iterator[Record]:
    if after is None:
        return records
    last = after.number
    return dropwhile(lambda record: record[0] <= last, records)


def _chunks(
    path: Path, unit: str, records: Iterator[Record], position: Any, *, plain: bool
) -> Iterator[Chunk]:
    waiting: list[Record] = []
    size = before = 0
    for index, record in enumerate(records):
        if index == 0 and record[0] > 1:  # what lies in front was read by an earlier run
            before = position()
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


def _guarded(records: Iterator[Record], path: Path, unit: str) -> Iterator[Record]:
    """Turn the failures of a broken or unreadable stream into a DataError with the place."""
    number = end = 0
    try:
        for record in records:
            number, end = record[0], record[1] + len(record[2])
            yield record
    except (EOFError, zlib.error, OSError, zstd_error()) as error:
        raise DataError(
            f"{path}, after {unit} {number} (byte {end} uncompressed): the stream is broken: "
            f"{str(error).rstrip('.')}. What follows cannot be counted, so it is never skipped; "
            f"restore the file."
        ) from error


def _whole(stream: io.BufferedReader, path: Path) -> Iterator[Record]:
    text = stream.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise DataError(
            f"{path} is larger than {LARGEST_TEXT >> 20} MiB, too much for one document. Say "
            f"where documents end with --text-documents blank-line or line."
        )
    mark = len(BOM) if text.startswith(BOM) else 0
    yield 1, mark, text[mark:]


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
