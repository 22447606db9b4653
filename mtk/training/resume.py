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
from mtk.config.pretrain import PretrainConfig
from mtk.errors import CheckpointError
from mtk.training.compatibility import check_model, check_tokenizer
from mtk.training.opened_data import OpenedData
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


def find_start(config: PretrainConfig, save: Path, target_samples: int, data: OpenedData) -> Start:
    """Own checkpoints win over --load, so that the same command always continues.

    Raises CheckpointError when --load names nothing that this run can begin from, when a
    finished run with other options or data is in the way, or when all own checkpoints are
    damaged.
    """
    step = latest_step(save) if save.is_dir() else None
    damaged = [text for number, text in damaged_steps(save) if number > (step or 0)]
    if step is not None:
        return _continue(config, step_folder(save, step), target_samples, data, damaged)
    if damaged:
        raise CheckpointError(
            f"{damaged[-1]} No other checkpoint in {save} is complete; start over with --force."
        )
    if config.checkpoint.load is None:
        return Start()
    return _load(config, checkpoint_folder(config.checkpoint.load), target_samples, data)


def start_again(config: PretrainConfig, save: Path, target_samples: int, data: OpenedData) -> Start:
    """Of --force, which deletes the own checkpoints: --load, or fresh. Raises CheckpointError
    as :func:`find_start` does, and when --load is among those to be deleted."""
    if config.checkpoint.load is None:
        return Start()
    folder = checkpoint_folder(config.checkpoint.load)
    if folder.resolve().parent == save.resolve():
        raise CheckpointError(
            f"--force deletes the checkpoints of --save {save}, and --load {folder} is one of "
            f"them. Use another --save."
        )
    return _load(config, folder, target_samples, data)


def _continue(
    config: PretrainConfig,
    folder: Path,
    target_samples: int,
    data: OpenedData,
    damaged: Sequence[str],
) -> Start:
    artifact = open_artifact(folder, "checkpoint")
    changed = changes(artifact.config, config)
    if _consumed(folder) < target_samples:
        check_model(folder, config.model)
        return Start(folder, warnings=(*_damage(damaged), *_told(changed)))
    if artifact.config_digest == config_digest(config):
        changed = changed_inputs(artifact, config, data)
        if not changed:
            return Start(folder, finished=artifact)
    raise CheckpointError(
        f"{folder} is the end of a run with other options ({'; '.join(changed[:5])}). Train "
        f"longer to continue it, use another --save, or start over with --force."
    )


def _load(config: PretrainConfig, folder: Path, target_samples: int, data: OpenedData) -> Start:
    check_model(folder, config.model)
    check_tokenizer(folder, data.tokenizer_folder)
    if config.checkpoint.finetune:
        return Start(folder, weights_only=True)
    consumed = _consumed(folder)
    if consumed >= target_samples:
        raise CheckpointError(
            f"{folder} has seen {consumed} samples already, of {target_samples} asked for: "
            f"nothing is left to train. Train longer, or add --finetune to begin at step 0."
        )
    artifact = open_artifact(folder, "checkpoint")
    return Start(folder, warnings=tuple(_told(changes(artifact.config, config))))


def _consumed(folder: Path) -> int:
    return int(read_training(folder)["progress"]["consumed_samples"])


def _damage(texts: Sequence[str]) -> list[str]:
    return [f"a newer checkpoint is damaged and passed over: {text}" for text in texts]


def _told(changed: Sequence[str]) -> list[str]:
    return [f"continuing with a changed option: {change}" for change in changed]


def changed_inputs(artifact: Artifact, config: PretrainConfig, data: OpenedData) -> list[str]:
    """Inputs of a finished run that are no longer what they were."""
    found = []
    used = {record.digest for record in artifact.inputs if record.role == "training data"}
    if used != {record.digest for record in data.inputs()}:
        found.append("the training data have changed since")
    before = {record.digest for record in artifact.inputs if record.role == "initial model"}
    if config.checkpoint.load is not None and before:
        initial = checkpoint_folder(config.checkpoint.load)
        if open_artifact(initial, "checkpoint").digest not in before:
            found.append(f"it began from another model than --load {initial}")
    return found


def changes(saved: Mapping[str, Any], config: PretrainConfig) -> list[str]:
    """Options that can change the result and differ from ``saved``."""
    current = to_dict(config)
    found = []
    for leaf in leaves(PretrainConfig):
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
    (save / "metrics.jsonl").unlink(missing_ok=True)


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
