"""Tasks of lm-evaluation-harness on local data, without a network.

A task comes from a folder of the user's own, or from the harness; its data from the files that
the task names, from one file given instead, or from what lies in Hugging Face's cache already.
The harness's tasks may name Python functions, which run: give only folders you trust.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtk.artifacts import InputRecord, input_file
from mtk.config.evaluate import EvaluateConfig
from mtk.errors import ConfigError, DataError, Problem

# Read by the libraries when they are imported. Whoever sets them otherwise means it.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_MULTIPROC": "1",  # the harness's bootstrap would fork this process
}
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# The harness takes 100,000 resamplings, minutes for what changes in the third digit.
RESAMPLINGS = 1000
FEWSHOT_SEED = 1234  # the harness's own


@dataclass(frozen=True)
class HarnessResult:
    """figures: task -> metric -> value. items: one for each question. details: versions and
    settings. log_likelihoods: every one of them, to see that all are finite."""

    figures: dict[str, Any]
    items: list[dict[str, Any]]
    details: dict[str, Any]
    log_likelihoods: list[float]


def require_harness() -> None:
    """Raises ConfigError if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-eval tasks need lm-evaluation-harness, which is not installed. Install mtk[eval] "
            "(or lm-eval); WIKITEXT103 and LAMBADA need nothing."
        )


@contextlib.contextmanager
def surroundings(folder: Path | None, *, first: bool) -> Iterator[None]:
    """Inside the block nothing is downloaded, relative paths are those of ``folder``, and what
    the harness prints goes to stderr (of the first rank)."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    stream = sys.stderr if first else io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
            contextlib.chdir(folder) if folder else contextlib.nullcontext(),
        ):
            yield
    finally:
        for name, found in before.items():
            if found is None:
                os.environ.pop(name, None)


# -- what belongs to the digest -----------------------------------------------------------


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


# -- tasks --------------------------------------------------------------------------------


def load_tasks(config: EvaluateConfig, folder: Path | None, data: Path | None) -> dict[str, Any]:
    """The harness's tasks by name, with their data. Call it inside :func:`surroundings`.

    data: takes the place of the one task's data set. Raises ConfigError for an unknown name,
    DataError for data that is not there.
    """
    from lm_eval.tasks import TaskManager

    names = list(config.harness_tasks)
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError([_unknown(name, manager.all_tasks) for name in unknown])
    specs = [_with_data(manager, names[0], data)] if data else names
    try:
        tasks: dict[str, Any] = manager.load(specs)["tasks"]
    except Exception as error:  # whatever the data set's reader raises
        first = str(error).strip().split("\n")[0]
        raise DataError(
            f"the data of {', '.join(names)} cannot be read: {type(error).__name__}: {first} "
            f"mtk downloads nothing. Give the data as --valid-data FILE, or a task file with "
            f"dataset_path: json and data_files in a folder, with --lm-eval-tasks FOLDER."
        ) from error
    for task in tasks.values():
        _shots(task, config.num_fewshot)
    return tasks


def _unknown(name: str, known: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(name, known, n=3)
    fix = f"Nearest: {', '.join(near)}." if near else "Give task files with --lm-eval-tasks."
    return Problem("task", name, f"is none of the {len(known)} tasks that there are", fix)


def _with_data(manager: Any, name: str, data: Path) -> dict[str, Any]:
    """A group of one task, since in a group parts of a task can be overruled."""
    settings = manager.task_index[name].cfg or {}
    split = settings.get("test_split") or settings.get("validation_split")
    if split is None or "class" in settings:
        rule = f"cannot take the place of the data of {name}, which is not one file of questions"
        raise ConfigError([Problem("valid_data", str(data), rule, "Use --lm-eval-tasks.")])
    if data.suffix not in READERS:
        rule = f"must be one of {', '.join(READERS)}"
        raise ConfigError([Problem("valid_data", str(data), rule)])
    overruled = {
        "task": name,
        "dataset_path": READERS[data.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
    }
    # Splits that are not there must not be asked for.
    for other in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if settings.get(other) not in (None, split):
            overruled[other] = None
    return {"group": "mtk", "task": [overruled]}


def _shots(task: Any, asked: int | None) -> None:
    """As the harness's own command line sets them."""
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


# -- running ------------------------------------------------------------------------------


def run_tasks(model: Any, tasks: Mapping[str, Any], limit: int | None, *, first: bool) -> Any:
    """The harness's evaluation; every rank runs it and gets the same requests answered.

    Raises DataError for tasks that run code or need pictures.
    """
    from lm_eval.evaluator import evaluate

    try:
        return evaluate(
            lm=model,
            task_dict={"tasks": dict(tasks)},
            limit=limit,
            bootstrap_iters=RESAMPLINGS if first else 0,
            log_samples=True,
        )
    except ValueError as error:
        if "unsafe" in str(error) or "multimodal" in str(error):
            raise DataError(f"{error} mtk does not run such tasks.") from error
        raise


def harness_result(found: Mapping[str, Any], limit: int | None) -> HarnessResult:
    """The harness's results as mtk writes them."""
    from lm_eval import __version__ as version

    figures = {name: _metrics(values) for name, values in found["results"].items()}
    items, values = [], []
    for name, samples in found["samples"].items():
        for sample in samples:
            items.append(_item(name, sample))
            values += _log_likelihoods(sample["filtered_resps"])
    details = {
        "harness": {
            "lm_eval": version,
            "bootstrap_iters": RESAMPLINGS,
            "limit": limit,
            "tasks": {
                name: {
                    "version": found["versions"].get(name),
                    "num_fewshot": found["n-shot"].get(name),
                    "questions": dict(found["n-samples"].get(name, {})),
                    "higher_is_better": found["higher_is_better"].get(name),
                }
                for name in found["results"]
            },
        }
    }
    return HarnessResult(figures, items, details, values)


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """``acc,none`` -> ``acc``; other filters stay in the name."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and "," in key
    }


def _item(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    responses = sample["filtered_resps"]
    values = _log_likelihoods(responses)
    item: dict[str, Any] = {"task": task, "doc_id": sample["doc_id"], "filter": sample["filter"]}
    if values:
        item["log_likelihoods"] = values
        greedy = [bool(r[1]) for r in responses if isinstance(r, (tuple, list))]
        item |= {"greedy": greedy} if greedy else {}
    else:
        item["responses"] = [str(response) for response in responses]
    item["target"] = str(sample["target"])
    item["metrics"] = {name: _plain(sample[name]) for name in sample["metrics"]}
    return item | {name: sample[name] for name in ("doc_hash", "prompt_hash", "target_hash")}


def _log_likelihoods(responses: Sequence[Any]) -> list[float]:
    """Of continuations ((value, greedy) each) or of whole texts; none of generated texts."""
    values = [r[0] if isinstance(r, (tuple, list)) and r else r for r in responses]
    return [float(value) for value in values if isinstance(value, (int, float))]


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return float(value) if hasattr(value, "__float__") else str(value)
