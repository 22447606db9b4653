"""Records of a crawl: read from any place on, looked at as pages, written as lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.data.records import parse_record
from mtk.data.sources import Chunk, TextDocuments, file_format, read_chunks
from mtk.errors import DataError

Place = tuple[int, int]  # index of the file, number of its last record that was read
START: Place = (0, 0)


@dataclass(frozen=True)
class Stretch:
    """Consecutive records of one file. file: its index among the input."""

    file: int
    chunk: Chunk

    @property
    def end(self) -> Place:
        return self.file, self.chunk.numbers[-1]

    @property
    def size(self) -> int:
        """Bytes of the records, uncompressed."""
        return sum(map(len, self.chunk.records))


@dataclass(frozen=True)
class Source:
    """The input of a step. key: the field that must be there. All columns of a Parquet file
    are read, since what a step does not look at stays in the record."""

    files: tuple[Path, ...]
    key: str
    text_documents: TextDocuments

    def after(self, place: Place) -> Iterator[Stretch]:
        """Everything behind ``place``, in order. Raises DataError for a file that breaks off."""
        for index in range(place[0], len(self.files)):
            path = self.files[index]
            for chunk in read_chunks([path], _keys(path, self.key), self.text_documents):
                rest = _behind(chunk, place[1] if index == place[0] else 0)
                if rest is not None:
                    yield Stretch(index, rest)

    def behind(self, place: Place) -> int:
        """Bytes on disk that need not be read again, for a progress bar that goes on."""
        return sum(path.stat().st_size for path in self.files[: place[0]])


def _behind(chunk: Chunk, number: int) -> Chunk | None:
    """What of the chunk comes after record ``number``. A part ends with a chunk, so it is
    nearly always all or nothing."""
    if chunk.numbers[0] > number:
        return chunk
    if chunk.numbers[-1] <= number:
        return None
    first = next(i for i, n in enumerate(chunk.numbers) if n > number)
    return dataclasses.replace(
        chunk,
        records=chunk.records[first:],
        numbers=chunk.numbers[first:],
        starts=chunk.starts[first:],
    )


def _keys(path: Path, key: str) -> Sequence[str]:
    if file_format(path)[0] != ".parquet":
        return [key]
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}.") from error
    return names if key in names else [*names, key]


@dataclass(frozen=True)
class Page:
    """One good record. text: the value of ``key``; ready-made sentences are joined by spaces."""

    raw: bytes
    plain: bool
    key: str
    text: str

    @property
    def record(self) -> dict[str, Any]:
        """All fields."""
        if self.plain:
            return {self.key: self.text}
        found: dict[str, Any] = json.loads(self.raw)
        return found

    def line(self) -> bytes:
        """The record as it came, on one line without its end."""
        raw = self.raw.strip()
        if self.plain or b"\n" in raw or b"\r" in raw:
            return to_line(self.record)
        return raw

    def changed(self, text: str, **more: str) -> bytes:
        """The record with another text and further fields, as a line."""
        return to_line({**self.record, self.key: text, **more})


def open_page(chunk: Chunk, index: int, key: str) -> Page:
    """Record ``index`` of a chunk. Raises RecordError, with the reasons of ``mtk preprocess``."""
    raw = chunk.records[index]
    [text] = parse_record(raw, (key,), plain=chunk.plain)
    return Page(raw, chunk.plain, key, text if isinstance(text, str) else " ".join(text))


def to_line(record: dict[str, Any]) -> bytes:
    """JSON in UTF-8. Fields that UTF-8 cannot hold (half a surrogate pair) are escaped."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(record).encode()


def name_of(page: Page, id_key: str, place: str) -> str:
    """What a page is called in reports: its field ``id_key``, else its place."""
    return name_of_record(page.record, id_key, place)


def name_of_record(record: dict[str, Any], id_key: str, place: str) -> str:
    value = record.get(id_key)
    named = isinstance(value, (str, int)) and not isinstance(value, bool)
    return str(value).encode(errors="replace").decode() if named else place
