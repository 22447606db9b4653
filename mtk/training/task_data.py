"""Training data in files of a task, as the run knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtk.artifacts import InputRecord, input_file
from mtk.data.sources import expand_inputs
from mtk.tokenizers import Tokenizer
from mtk.training.opened_data import DATA_ROLE


@dataclass(frozen=True)
class TaskFiles:
    """``--train-data`` and ``--valid-data`` with the tokenizer that reads them."""

    train: tuple[Path, ...]
    valid: tuple[Path, ...]
    records: tuple[InputRecord, ...]
    tokenizer: Tokenizer

    @classmethod
    def open(cls, train: Sequence[Path], valid: Sequence[Path], tokenizer: Tokenizer) -> TaskFiles:
        records = tuple(input_file(path, DATA_ROLE) for path in (*train, *valid))
        return cls(tuple(train), tuple(valid), records, tokenizer)

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    @property
    def tokenizer_folder(self) -> None:
        """It is the model's own, so there is nothing to compare it with."""

    def inputs(self) -> list[InputRecord]:
        return list({record.content: record for record in self.records}.values())

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    @property
    def train_digests(self) -> list[str]:
        return [record.content for record in self.records[: len(self.train)]]

    @property
    def valid_digests(self) -> list[str]:
        return [record.content for record in self.records[len(self.train) :]]


def named_files(patterns: Sequence[str], option: str) -> list[Path]:
    """The files that paths and globs name. Raises DataError."""
    return expand_inputs(patterns, option=option)
