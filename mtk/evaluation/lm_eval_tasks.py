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
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtk.config.evaluate import EvaluateConfig
from mtk.errors import ConfigError, DataError, GateError, Problem

# Read by the libraries when they are imported. Whoever sets them otherwise means it.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "DISABLE_MULTIPROC": "1",  # the harness's bootstrap would fork this process
}
# Where they keep what they have read, in case they were imported before.
SWITCHES = ("huggingface_hub.constants", "datasets.config")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# The harness takes 100,000 resamplings, minutes for what changes in the third digit.
RESAMPLINGS = 1000
FEWSHOT_SEED = 1234  # the harness's own


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
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    os.environ.update({name: ENVIRONMENT[name] for name in missing})
    offline = os.environ["HF_HUB_OFFLINE"] == "1"
    modules = [sys.modules[name] for name in SWITCHES if offline and name in sys.modules]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    stream = sys.stderr if first else io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
            contextlib.chdir(folder) if folder else contextlib.nullcontext(),
        ):
            yield
    finally:
        for module, found in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = found  # type: ignore[attr-defined]
        for name in missing:
            os.environ.pop(name, None)


# -- tasks --------------------------------------------------------------------------------


def load_tasks(config: EvaluateConfig, folder: Path | None, data: Path | None) -> dict[str, Any]:
    """The harness's tasks by name, with their data. Call it inside :func:`surroundings`.

    data: takes the place of the one task's data set. Raises ConfigError for an unknown name,
    DataError for data that is not there.
    """
    names = list(config.harness_tasks)
    manager = _manager(names, folder)
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


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's index of tasks: of the folder, of its own, or of both (the folder's win)."""
    from lm_eval.tasks import TaskManager

    own: list[str] = []
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = manager.all_tasks
        if set(names) <= set(own):
            return manager
    published = _published()
    known = [*own, *published.all_tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError([_unknown(name, known) for name in unknown])
    mixed = folder is not None and not set(names).isdisjoint(own)
    return TaskManager(include_path=str(folder)) if mixed else published


@lru_cache(maxsize=1)
def _published() -> Any:
    """It reads 14,000 files that do not change while this process runs."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


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


def without_examples(tasks: Mapping[str, Any], asked: int | None) -> list[str]:
    """Tasks that say themselves that nothing stands in front of a question."""
    return [name for name, task in tasks.items() if asked and not task.get_config("num_fewshot")]


# -- running ------------------------------------------------------------------------------


def run_tasks(model: Any, tasks: Mapping[str, Any], limit: int | None, *, first: bool) -> Any:
    """The harness's evaluation; every rank runs it and gets the same requests answered.

    Raises DataError for tasks that run code or need pictures, GateError for a metric beyond
    what a number holds.
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
    except OverflowError as error:
        raise GateError(
            f"a metric of {', '.join(tasks)} is too large for a number ({error}): the model gives "
            f"these texts next to no probability. Nothing was published."
        ) from error
    except ValueError as error:
        if "unsafe" in str(error) or "multimodal" in str(error):
            raise DataError(f"{error} mtk does not run such tasks.") from error
        raise
