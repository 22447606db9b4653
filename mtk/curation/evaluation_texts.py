"""Texts of evaluation sets, which training must not have seen."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.errors import DataError
from mtk.evaluation.documents import read_objects, read_records, read_text

_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True)
class EvaluationFiles:
    """By format. lambada: JSON lines with ``text``. race: ``.txt`` files of JSON, or folders of
    them. text: plain text such as WikiText's, parted by empty lines. jsonl: JSON lines of any
    kind, of which the fields ``keys`` are read."""

    lambada: tuple[Path, ...]
    race: tuple[Path, ...]
    text: tuple[Path, ...]
    jsonl: tuple[Path, ...]
    keys: tuple[str, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        return (*self.lambada, *self.race, *self.text, *self.jsonl)

    def texts(self) -> Iterator[str]:
        """Every passage, article and question. Raises DataError naming file and line."""
        for path in self.lambada:
            yield from (document.text for document in read_records(path, "text"))
        for path in self.race:
            yield from _race_texts(path)
        for path in self.text:
            yield from _BLANK_LINES.split(read_text(path))
        for path in self.jsonl:
            yield from _field_texts(path, self.keys)


def find_files(patterns: Sequence[str], option: str) -> tuple[Path, ...]:
    """Files behind paths and globs; of a folder all ``.txt`` files below. Raises DataError."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        files = [path]  # whatever its suffix: WikiText's is .tokens
        if path.is_dir():
            files = sorted(path.rglob("*.txt"))
        elif not path.exists():
            names = glob.glob(pattern, recursive=True)  # noqa: PTH207 - absolute patterns too
            files = [file for file in map(Path, sorted(names)) if file.is_file()]
        if not files:
            what = "no .txt file lies below it" if path.is_dir() else "no such file"
            raise DataError(f"{option} {pattern}: {what}.")
        found.update(dict.fromkeys(files))
    return tuple(found)


def _race_texts(path: Path) -> Iterator[str]:
    for record, origin in read_objects(path):
        article, questions = record.get("article"), record.get("questions")
        if not isinstance(article, str) or not isinstance(questions, list):
            raise DataError(f"{origin} is not RACE's: it needs an article and questions.")
        yield article
        yield from _texts(questions, f"{origin}: questions")


def _field_texts(path: Path, keys: Sequence[str]) -> Iterator[str]:
    for record, origin in read_objects(path):
        there = [key for key in keys if key in record]
        if not there:
            raise DataError(
                f"{origin} has none of the fields {', '.join(keys)}; it has "
                f"{', '.join(sorted(record)) or 'none'}. Correct --evaluation-keys."
            )
        for key in there:
            yield from _texts(record[key], f"{origin}: field {key!r}")


def _texts(value: Any, where: str) -> list[str]:
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in found):
        raise DataError(f"{where} is neither a text nor a list of texts.")
    return found
