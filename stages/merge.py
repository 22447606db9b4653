"""``mtk merge``: the datasets of a folder to one."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from mtk.artifacts import Artifact, publish_prefix
from mtk.config.preprocess import MergeConfig
from mtk.data.dataset_artifact import (
    DatasetInfo,
    open_dataset,
    pair,
    refuse_foreign,
    tokenizer_folder,
)
from mtk.data.indexed_dataset import IndexedDataset, bin_path, merge_datasets
from mtk.data.stop import terminate_cleanly
from mtk.errors import DataError
from mtk.session import Session
from stages.skip import up_to_date

STAGE = "merge"
LEVELS = ("document", "sentence")


def run(config: MergeConfig, session: Session | None = None) -> Artifact:
    """Concatenate all ``.bin``/``.idx`` pairs of a folder, sorted by name, into ``P``.

    Raises DataError for a pair that is incomplete or damaged, and for datasets of
    different dtypes, levels, tokenizers or end-of-document habits.
    """
    session = session or Session()
    datasets = _find(config)
    inputs = [info.input_record(f"dataset {info.prefix.name}") for info in datasets]
    done = up_to_date(config.output_prefix, STAGE, config, inputs, session)
    if done is not None:
        return done
    _check_alike(datasets, session)
    name = Path(config.output_prefix).name
    refuse_foreign(pair(config.output_prefix), config.output_prefix, force=session.force)
    publishing = publish_prefix(
        config.output_prefix,
        kind="dataset",
        stage=STAGE,
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    )
    with terminate_cleanly(), publishing as publication:
        merge_datasets([info.prefix for info in datasets], publication.folder / name)
        known = all(info.tokenizer_fingerprint is not None for info in datasets)
        first = datasets[0]
        if known and first.tokenizer_folder is not None:
            shutil.copytree(first.tokenizer_folder, publication.folder / tokenizer_folder(name))
        publication.metrics |= _metrics(datasets, publication.folder / name, known=known)
    return publication.artifact


def _find(config: MergeConfig) -> list[DatasetInfo]:
    folder = Path(config.input)
    if not folder.is_dir():
        raise DataError(f"--input {folder} is not a folder.")
    halves = {".bin": set[str](), ".idx": set[str]()}
    for path in folder.iterdir():
        if path.suffix in halves and fnmatch.fnmatch(path.stem, config.match):
            halves[path.suffix].add(path.stem)
    alone = sorted(halves[".bin"] ^ halves[".idx"])
    if alone:
        there = ".bin" if alone[0] in halves[".bin"] else ".idx"
        raise DataError(
            f"{folder / alone[0]}{there} has no other half ({len(alone)} such files). Remove or "
            f"complete it, or choose datasets with --match."
        )
    # However the two paths are written: the output must never become part of itself.
    output = bin_path(config.output_prefix)
    output = output.parent.resolve() / output.name
    here = folder.resolve()
    names = [name for name in sorted(halves[".bin"]) if bin_path(here / name) != output]
    if not names:
        raise DataError(
            f"{folder} holds no dataset, other than the output, whose name fits --match "
            f"{config.match!r}."
        )
    return [open_dataset(folder / name) for name in names]


def _check_alike(datasets: list[DatasetInfo], session: Session) -> None:
    """One tokenizer, one level, one rule for EOD. Raises DataError naming two that differ."""
    levels = {info.prefix: _level(info) for info in datasets}
    _refuse_difference(
        {prefix: level for prefix, level in levels.items() if level},
        "level",
        "Choose one kind with --match, e.g. '*_document'.",
    )
    known = {
        info.prefix: info.tokenizer_fingerprint
        for info in datasets
        if info.tokenizer_fingerprint is not None
    }
    _refuse_difference(
        known, "tokenizer fingerprint", "Their token ids mean different texts; preprocess again."
    )
    habits = {
        info.prefix: str(info.artifact.metrics["append_eod"])
        for info in datasets
        if info.artifact is not None and "append_eod" in info.artifact.metrics
    }
    _refuse_difference(habits, "--append-eod", "Preprocess them alike.")
    unknown = len(datasets) - len(known)
    if unknown:
        session.reporter.warn(
            f"{unknown} of {len(datasets)} datasets have no manifest that names their tokenizer; "
            f"the merged dataset will not name one either"
        )


def _level(info: DatasetInfo) -> str | None:
    if info.artifact is not None and info.artifact.metrics.get("level"):
        return str(info.artifact.metrics["level"])
    return next((level for level in LEVELS if info.prefix.name.endswith(f"_{level}")), None)


def _refuse_difference(values: dict[Path, str], what: str, fix: str) -> None:
    first = next(iter(values), None)
    for prefix, value in values.items():
        if first is not None and value != values[first]:
            raise DataError(
                f"{first} and {prefix} differ in their {what}: {values[first][:16]} and "
                f"{value[:16]}. {fix}"
            )


def _metrics(datasets: list[DatasetInfo], merged: Path, *, known: bool) -> dict[str, object]:
    result = IndexedDataset(merged)
    numbers: dict[str, object] = {
        "datasets": len(datasets),
        "documents": result.num_documents,
        "sequences": len(result),
        "tokens": result.num_tokens,
    }
    artifact = datasets[0].artifact
    if known and artifact is not None:
        same = ("level", "append_eod", "tokenizer_kind", "tokenizer_fingerprint")
        numbers |= {
            name: artifact.metrics[name]
            for name in (*same, "vocab_size", "eod")
            if name in artifact.metrics
        }
    return numbers
