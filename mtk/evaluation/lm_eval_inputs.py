"""The files that a folder of harness tasks is made of, for the digest of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtk.artifacts import InputRecord, input_file
from mtk.config.evaluate import EvaluateConfig
from mtk.errors import DataError


class _Plain(yaml.SafeLoader):
    """Reads a task file without running what it names."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: None)


def harness_inputs(config: EvaluateConfig) -> list[InputRecord]:
    """The user's task files, and the data files they name. Raises DataError."""
    if config.lm_eval_tasks is None:
        return []
    folder = Path(config.lm_eval_tasks)
    tasks = sorted([*folder.rglob("*.yaml"), *folder.rglob("*.py")])
    if not any(path.suffix == ".yaml" for path in tasks):
        raise DataError(f"{folder} holds no task file (*.yaml). See --lm-eval-tasks.")
    data = {file for path in tasks if path.suffix == ".yaml" for file in data_files(path, folder)}
    records = [input_file(path, "task") for path in tasks]
    return records + [input_file(path, "data") for path in sorted(data)]


def data_files(path: Path, folder: Path) -> list[Path]:
    """The local files that a task file names under ``dataset_kwargs``. Raises DataError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not a task file: {error}.") from error
    named = content.get("dataset_kwargs") if isinstance(content, dict) else None
    found = named.get("data_files") if isinstance(named, dict) else None
    files = [folder / text for text in _texts(found) if not set(text) & set("*?[") and text]
    files = [file for file in files if "://" not in str(file)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise DataError(
            f"{path} names the data file {missing}, which does not exist. Names are relative to "
            f"--lm-eval-tasks."
        )
    return files


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)
