"""Where a run starts: fresh, from its own newest checkpoint, from --load, or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, open_artifact, remove_leftovers
from mtk.checkpoint.steps import checkpoint_folder, latest_step, step_folder
from mtk.config import config_digest, leaves, to_dict
from mtk.config.pretrain import PretrainConfig
from mtk.errors import CheckpointError
from mtk.training.state import read_training


@dataclass(frozen=True)
class Start:
    """folder: the checkpoint to begin from, or None. weights_only: --finetune. finished:
    the artifact, when there is nothing left to do. changed: options that differ from
    those of the checkpoint, as texts."""

    folder: Path | None = None
    weights_only: bool = False
    finished: Artifact | None = None
    changed: tuple[str, ...] = ()


def find_start(config: PretrainConfig, save: Path, target_samples: int) -> Start:
    """Own checkpoints win over --load, so that the same command always continues.

    Raises CheckpointError when --load names nothing complete, or when a finished run with
    other options is in the way.
    """
    step = latest_step(save) if save.is_dir() else None
    if step is not None:
        return _continue(config, step_folder(save, step), target_samples)
    if config.checkpoint.load is None:
        return Start()
    folder = checkpoint_folder(config.checkpoint.load)
    return Start(folder, weights_only=config.checkpoint.finetune)


def _continue(config: PretrainConfig, folder: Path, target_samples: int) -> Start:
    artifact = open_artifact(folder, "checkpoint")
    changed = tuple(changes(artifact.config, config))
    consumed = read_training(folder)["progress"]["consumed_samples"]
    if consumed < target_samples:
        return Start(folder, changed=changed)
    if artifact.config_digest == config_digest(config):
        return Start(folder, finished=artifact)
    raise CheckpointError(
        f"{folder} is the end of a run with other options ({'; '.join(changed[:5])}). Train "
        f"longer to continue it, use another --save, or start over with --force."
    )


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
