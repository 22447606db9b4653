"""One raw record to its texts, or the exact reason why that is not possible."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.data.lines import Overlong
from mtk.data.sources import Chunk, TextDocuments, read_chunks
from mtk.errors import DataError

quick_json: Any
try:
    import orjson as quick_json
except ImportError:  # it comes with the extra "fast"
    quick_json = None

Texts = list[str | list[str]]  # by key: a text, or ready-made sentences


class RecordError(Exception):
    """A bad record. reason: a short constant to count by; byte: inside the record."""

    def __init__(self, reason: str, detail: str, byte: int = 0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.byte = reason, detail, byte


@dataclass(frozen=True)
class BadRecord:
    """Where a bad record is and what is wrong. byte: in the uncompressed file, or -1."""

    file: str
    unit: str
    number: int
    byte: int
    reason: str
    detail: str

    def __str__(self) -> str:
        byte = f" (byte {self.byte})" if self.byte >= 0 else ""
        return f"{self.file}, {self.unit} {self.number}{byte}: {self.reason}: {self.detail}"


def bad_record(chunk: Chunk, index: int, error: RecordError) -> BadRecord:
    """The place of record ``index`` of ``chunk`` joined with what is wrong there."""
    start = chunk.starts[index]
    byte = start + error.byte if start >= 0 else -1
    return BadRecord(chunk.file, chunk.unit, chunk.numbers[index], byte, error.reason, error.detail)


def refusal(bad: BadRecord) -> DataError:
    """What ``--on-bad-line fail`` says."""
    return DataError(f"{bad}. Correct it, or leave such records out with --on-bad-line skip.")


def parse_record(raw: bytes, keys: Sequence[str], *, plain: bool) -> Texts:
    """The value of each key: a text, or a list of ready-made sentences. Raises RecordError."""
    if not plain and (found := _quick_texts(raw, keys)) is not None:
        return found
    if isinstance(raw, Overlong):
        detail = f"it has {raw.size:,} bytes, --max-record-mb allows {raw.limit:,}"
        raise RecordError("too long", detail)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        detail = f"{error.reason} ({raw[error.start : error.start + 4]!r})"
        raise RecordError("invalid UTF-8", detail, error.start) from None
    if plain:
        return [text]
    if not text.strip():
        raise RecordError("empty line", "a record must be a JSON object")
    record = _object(text.rstrip("\r\n"))
    return [_value(record, key) for key in keys]


def _quick_texts(raw: bytes, keys: Sequence[str]) -> Texts | None:
    """The values, for the usual record; None wherever something has to be said about it.

    What orjson takes the standard library takes too, with the same texts: it is stricter, and
    refuses halves of surrogate pairs.
    """
    if quick_json is None:
        return None
    try:
        record = quick_json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if type(record) is not dict:
        return None
    texts: list[Any] = [record.get(key) for key in keys]
    return texts if all(type(text) is str for text in texts) else None


def _object(text: str) -> dict[str, object]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode())
        near = text[max(error.pos - 10, 0) : error.pos + 10].rstrip("\n")
        raise RecordError("invalid JSON", f"{error.msg} near {near!r}", byte) from None
    except RecursionError:
        raise RecordError("invalid JSON", "nested too deep") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RecordError("invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        found = type(record).__name__
        raise RecordError("not an object", f"the record is a {found}, not {{...}}")
    return record


def _value(record: dict[str, object], key: str) -> str | list[str]:
    if key not in record:
        have = ", ".join(map(repr, list(record)[:8])) or "no keys"
        raise RecordError("missing key", f"no {key!r}; the record has {have}")
    value = record[key]
    for sentence in value if isinstance(value, list) else [value]:
        if not isinstance(sentence, str):
            inside = "a list with a " if isinstance(value, list) else "a "
            found = "null" if sentence is None else type(sentence).__name__
            raise RecordError("not text", f"{key!r} is {inside}{found}")
        if not sentence.isascii():
            _check_unicode(sentence, key)
    checked: str | list[str] = value  # type: ignore[assignment]  # checked just above
    return checked


def _check_unicode(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        detail = f"{key!r} holds half of a surrogate pair ({code} at character {error.start})"
        raise RecordError("lone surrogate", detail) from None


def read_texts(
    files: Sequence[Path],
    keys: Sequence[str],
    text_documents: TextDocuments,
    *,
    skip_bad: bool = False,
    bad: Counter[str] | None = None,
) -> Iterator[str]:
    """Every text of every key in order; sentences of a list joined by spaces.

    bad: counts by reason what ``skip_bad`` leaves out. Raises DataError at the first bad
    record unless ``skip_bad``.
    """
    for chunk in read_chunks(files, keys, text_documents):
        for index, raw in enumerate(chunk.records):
            try:
                texts = parse_record(raw, keys, plain=chunk.plain)
            except RecordError as error:
                if not skip_bad:
                    raise refusal(bad_record(chunk, index, error)) from None
                if bad is not None:
                    bad[error.reason] += 1
                continue
            for text in texts:
                yield text if isinstance(text, str) else " ".join(text)
