"""Reading the files that a model is scored on; a bad one is named with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.errors import DataError


@dataclass(frozen=True)
class Document:
    """Text and where it comes from, e.g. ``data/test.jsonl:3``."""

    text: str
    origin: str

    @property
    def label(self) -> str:
        """The origin without folders, so that results do not depend on where files lie."""
        return self.origin.rsplit("/", 1)[-1]


def read_text(path: Path) -> str:
    """A whole file as UTF-8. Raises DataError, with the byte where it is not."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} is {data[error.start]:#04x}."
        ) from error
    # Some editors begin a file with a byte order mark.
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"{path} is empty; there is nothing to score.")
    # As Python's text mode reads line ends, which the published numbers were made with.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_object(line: str, origin: str) -> dict[str, Any]:
    """Raises DataError for a line that is no JSON object."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{origin} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise DataError(f"{origin} is a JSON {type(record).__name__}, not an object.")
    return record


def read_objects(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The object of every line of a JSONL file, with its place; blank lines are passed over."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            origin = f"{path}:{number}"
            yield parse_object(line, origin), origin


def read_records(path: Path, key: str) -> Iterator[Document]:
    """The field ``key`` of every line of a JSONL file; blank lines are passed over.

    Raises DataError for a line that is not an object, or has no such text.
    """
    for record, origin in read_objects(path):
        if key not in record:
            found = ", ".join(sorted(record)) or "none"
            raise DataError(f"{origin} has no field {key!r} (it has: {found}). See --text-key.")
        if not isinstance(record[key], str) or not record[key].strip():
            raise DataError(f"{origin}: field {key!r} is not a text, or is empty.")
        _require_unicode(record[key], f"{origin}: field {key!r}")
        yield Document(record[key], origin)


def _require_unicode(text: str, where: str) -> None:
    """JSON can spell half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds a lone surrogate ({text[error.start]!a}), so it is not Unicode."
        ) from error


def read_documents(path: Path, key: str) -> list[Document]:
    """A ``.jsonl`` or ``.json`` file is one document a line, any other file is one document."""
    if path.suffix in (".jsonl", ".json"):
        return read_passages(path, key)
    return [Document(read_text(path), str(path))]


def read_passages(path: Path, key: str) -> list[Document]:
    """A document of each line, as :func:`read_records`."""
    return list(read_records(path, key))
