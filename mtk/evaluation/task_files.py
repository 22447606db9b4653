"""What ``--train-data`` and ``--valid-data`` of RACE, MNLI and QQP name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtk.config.evaluate import EvaluateConfig
from mtk.config.heads import TASKS, ClassificationTask
from mtk.errors import DataError
from mtk.evaluation.classification import ClassificationData, LabelledText
from mtk.evaluation.glue import Warn, glue_name, read_mnli, read_qqp
from mtk.evaluation.race import race_name, read_race
from mtk.tokenizers import Tokenizer


def files_of(task: ClassificationTask, paths: Sequence[str]) -> list[Path]:
    """All files behind the paths: RACE's are folders. Raises DataError."""
    found: list[Path] = []
    for path in map(Path, paths):
        if task.name == "RACE":
            if not path.is_dir():
                raise DataError(f"{path} is not a folder. RACE's data are folders of *.txt files.")
            found += sorted(path.glob("*.txt"))
        elif not path.is_file():
            raise DataError(f"{path} is not a file. {task.name}'s data are .tsv files.")
        else:
            found.append(path)
    return found


def data_files(config: EvaluateConfig) -> list[Path]:
    """The files that an evaluation reads, whatever its task. Raises DataError."""
    if config.task in TASKS:
        return files_of(TASKS[config.task], config.valid_data)
    return [Path(path) for path in config.valid_data]


def read_task(
    task: ClassificationTask, path: str, tokenizer: Tokenizer, seq_length: int, warn: Warn
) -> ClassificationData:
    """The samples of one path. Raises DataError and ConfigError."""
    texts, name = _texts(task.name, path, warn)
    if not texts:
        raise DataError(f"{path} holds no question.")
    return ClassificationData(task, texts, tokenizer, seq_length, name)


def _texts(task: str, path: str, warn: Warn) -> tuple[list[LabelledText], str]:
    if task == "RACE":
        return read_race(path), race_name(path)
    if task == "MNLI":
        return read_mnli(path), glue_name(path, task)
    return read_qqp(path, warn), glue_name(path, task)


def unique_names(data: Sequence[ClassificationData]) -> list[str]:
    """A name for each, fit for a file: those of paths without a known folder are shortened, and
    equal ones numbered."""
    names: list[str] = []
    for one in data:
        stem = "".join(c if c.isalnum() or c in "-." else "-" for c in one.name).strip("-.")
        stem = stem[-60:].strip("-.") or "data"
        taken = sum(name == stem or name.startswith(f"{stem}-no") for name in names)
        names.append(stem if not taken else f"{stem}-no{taken + 1}")
    return names
