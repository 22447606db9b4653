"""The datasets that a run names, opened once and checked against each other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mtk.artifacts import InputRecord
from mtk.config.pretrain import DataConfig
from mtk.data.blend import parse_blend
from mtk.data.dataset_artifact import DatasetInfo, open_dataset
from mtk.errors import DataError

# Options that name datasets.
DATA_ROLE = "training data"
PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


@dataclass(frozen=True)
class OpenedData:
    """All datasets that a run names, which must share one tokenizer.

    fingerprint, tokenizer_folder, eod: of the tokenizer; None for foreign or mock data.
    """

    datasets: tuple[DatasetInfo, ...]
    fingerprint: str | None
    tokenizer_folder: Path | None
    vocab_size: int | None
    eod: int | None

    def inputs(self) -> list[InputRecord]:
        """Each dataset artifact once, however many of its keys are used."""
        records = {r.digest: r for r in (d.input_record(DATA_ROLE) for d in self.datasets)}
        return list(records.values())

    def save_tokenizer(self, folder: Path) -> None:
        """What a checkpoint keeps: the tokenizer of the data, if they name one."""
        if self.tokenizer_folder is not None:
            shutil.copytree(self.tokenizer_folder, folder)


def open_data(config: DataConfig) -> OpenedData:
    """Open every prefix of the data options. Raises DataError, also when the datasets were
    made with different tokenizers."""
    prefixes: dict[str, None] = {}
    for name in PATHS:
        if items := getattr(config, name):
            prefixes |= dict.fromkeys(parse_blend(items, f"--{name.replace('_', '-')}").prefixes)
    datasets = tuple(open_dataset(prefix) for prefix in prefixes)
    known = [d for d in datasets if d.tokenizer_fingerprint is not None]
    for dataset in known[1:]:
        if dataset.tokenizer_fingerprint != known[0].tokenizer_fingerprint:
            raise DataError(
                f"{known[0].prefix} and {dataset.prefix} were made with different tokenizers "
                f"(fingerprints {str(known[0].tokenizer_fingerprint)[:12]}... and "
                f"{str(dataset.tokenizer_fingerprint)[:12]}...). Preprocess them with one."
            )
    if not known:
        return OpenedData(datasets, None, None, None, None)
    first = known[0]
    return OpenedData(
        datasets,
        first.tokenizer_fingerprint,
        first.tokenizer_folder,
        first.vocab_size,
        first.eod,
    )
