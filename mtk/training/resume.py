"""Where a run starts: fresh, from its own newest checkpoint, from --load, or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, open_artifact, remove_leftovers
from mtk.checkpoint.steps import checkpoint_folder, damaged_steps, latest_step, step_folder
from mtk.config import config_digest, leaves, to_dict
from mtk.errors import CheckpointError
from mtk.training.best import BEST
from mtk.training.compatibility import check_model, check_tokenizer
from mtk.training.job import Job
from mtk.training.state import read_training


@dataclass(frozen=True)
class Start:
    """folder: the checkpoint to begin from, or None. weights_only: --finetune. finished:
    the artifact, when there is nothing left to do. warnings: options that differ from those
    of the checkpoint, and newer checkpoints that are damaged."""

    folder: Path | None = None
    weights_only: bool = False
    finished: Artifact | None = None
    warnings: tuple[str, ...] = ()


def find_start(job: Job) -> Start:
    """Own checkpoints win over --load, so that the same command always continues.

    Raises CheckpointError when --load names nothing that this run can begin from, when a
    finished run with other options or data is in the way, or when all own checkpoints are
    damaged.
    """
    save, load = job.save, job.config.checkpoint.load
    step = latest_step(save) if save.is_dir() else None
    damaged = [text for number, text in damaged_steps(save) if number > (step or 0)]
    if step is not None:
        return _continue(job, step_folder(save, step), damaged)
    if damaged:
        raise CheckpointError(
            f"{damaged[-1]} No other checkpoint in {save} is complete; start over with --force."
        )
    return Start() if load is None else _load(job, checkpoint_folder(load))


def start_again(job: Job) -> Start:
    """Of --force, which deletes the own checkpoints: --load, or fresh. Raises CheckpointError
    as :func:`find_start` does, and when --load is among those to be deleted."""
    load, base = job.config.checkpoint.load, job.base
    if base is not None:
        _refuse_to_delete(job.save, base.source.folder, "--pretrained-checkpoint")
    if load is None:
        return Start()
    folder = checkpoint_folder(load)
    _refuse_to_delete(job.save, folder, "--load")
    return _load(job, folder)


def _refuse_to_delete(save: Path, folder: Path, option: str) -> None:
    if folder.resolve().parent == save.resolve():
        raise CheckpointError(
            f"--force deletes the checkpoints of --save {save}, and {option} {folder} is one of "
            f"them. Use another --save."
        )


def _continue(job: Job, folder: Path, damaged: Sequence[str]) -> Start:
    artifact = open_artifact(folder, "checkpoint")
    if artifact.stage != job.stage:
        raise CheckpointError(
            f"{folder} was written by mtk {artifact.stage}, so mtk {job.stage} cannot continue it. "
            f"Use another --save."
        )
    changed = changes(artifact.config, job.recorded)
    if _consumed(folder) < job.samples:
        check_model(folder, job.config.model)
        return Start(folder, warnings=(*_damage(damaged), *_told(changed)))
    if artifact.config_digest == config_digest(job.recorded):
        changed = changed_inputs(artifact, job)
        if not changed:
            return Start(folder, finished=artifact)
    raise CheckpointError(
        f"{folder} is the end of a run with other options ({'; '.join(changed[:5])}). Train "
        f"longer to continue it, use another --save, or start over with --force."
    )


def _load(job: Job, folder: Path) -> Start:
    check_model(folder, job.config.model)
    check_tokenizer(folder, job.data.tokenizer_folder)
    if job.config.checkpoint.finetune:
        return Start(folder, weights_only=True)
    consumed = _consumed(folder)
    if consumed >= job.samples:
        raise CheckpointError(
            f"{folder} has seen {consumed} samples already, of {job.samples} asked for: "
            f"nothing is left to train. Train longer, or add --finetune to begin at step 0."
        )
    artifact = open_artifact(folder, "checkpoint")
    return Start(folder, warnings=tuple(_told(changes(artifact.config, job.recorded))))


def _consumed(folder: Path) -> int:
    return int(read_training(folder)["progress"]["consumed_samples"])


def _damage(texts: Sequence[str]) -> list[str]:
    return [f"a newer checkpoint is damaged and passed over: {text}" for text in texts]


def _told(changed: Sequence[str]) -> list[str]:
    return [f"continuing with a changed option: {change}" for change in changed]


def changed_inputs(artifact: Artifact, job: Job) -> list[str]:
    """Inputs of a finished run that are no longer what they were."""
    found = []
    used = {record.content for record in artifact.inputs if record.role == "training data"}
    if used != {record.content for record in job.data.inputs()}:
        found.append("the training data have changed since")
    before = {record.digest for record in artifact.inputs if record.role == "initial model"}
    load = job.config.checkpoint.load
    if load is not None and before:
        initial = checkpoint_folder(load)
        if open_artifact(initial, "checkpoint").digest not in before:
            found.append(f"it began from another model than --load {initial}")
    if job.base is not None and {record.digest for record in job.base.records()} != before:
        found.append(f"it began from another model than {job.base.path}")
    return found


def changes(saved: Mapping[str, Any], config: Any) -> list[str]:
    """Options that can change the result and differ from ``saved``."""
    current = to_dict(config)
    found = []
    for leaf in leaves(type(config)):
        if leaf.spec.runtime:
            continue
        old, new = _value(saved, leaf.path), _value(current, leaf.path)
        if old != new:
            found.append(f"{leaf.key} was {old!r}, now {new!r}")
    return found


def start_over(save: Path) -> None:
    """Delete all checkpoints and metrics of ``save`` (--force)."""
    for folder in save.glob("step_*"):
        (folder / "artifact.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
    for name in ("metrics.jsonl", BEST):
        (save / name).unlink(missing_ok=True)


@contextmanager
def exclusive(save: Path) -> Iterator[None]:
    """Make the folder of checkpoints and hold it for one run while the block runs.

    The lock ends with the process, however that ends. Raises CheckpointError when the
    folder cannot be made or another run holds it.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        stream = (save / ".lock").open("a")
    except OSError as error:
        raise CheckpointError(f"--save {save} cannot be written: {error.strerror}.") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is training into {save}. Wait for it, or use another --save."
            ) from error
        remove_leftovers(save, "step_*")
        yield


def _value(nested: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = nested
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
