"""All state of a run to and from a checkpoint: weights, optimizer, random, counters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.checkpoint.load import check_names
from mtk.checkpoint.save import CheckpointContent
from mtk.checkpoint.tensors import iterate_tensors, read_index, read_tensors
from mtk.config.model import ModelConfig
from mtk.errors import CheckpointError
from mtk.training.progress import RunProgress
from mtk.training.random_state import random_state, restore_random_state
from mtk.training.step import Stepper


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to be continued.

    data: digest of the training data and its order; tokenizer: fingerprint or None.
    """

    data: str
    tokenizer: str | None
    seed: int
    precision: str

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        return [
            f"{name} was {saved.get(name)!r}, now {value!r}"
            for name, value in vars(self).items()
            if saved.get(name) != value
        ]


def gather(
    stepper: Stepper,
    progress: RunProgress,
    identity: Identity,
    model_config: ModelConfig,
    tokenizer_folder: Path | None,
) -> CheckpointContent:
    """The content of a checkpoint taken between two steps."""
    return CheckpointContent(
        model_config=model_config,
        weights=stepper.main.weights,
        optimizer=stepper.optimizer.state_tensors(),
        random=random_state(stepper.device),
        training={
            "progress": progress.to_dict(),
            "loss_scale": stepper.loss_scale.to_dict(),
            "identity": vars(identity),
        },
        tokenizer_folder=tokenizer_folder,
    )


def restore_weights(stepper: Stepper, folder: Path) -> None:
    """Weights only, strictly by name and shape. Raises CheckpointError."""
    weights = stepper.main.weights
    check_names(set(read_index(folder, "model")), set(weights), folder)
    for name, tensor in iterate_tensors(folder, "model"):
        if tensor.shape != weights[name].shape:
            raise CheckpointError(
                f"{folder}: {name} is {list(tensor.shape)}, the model needs "
                f"{list(weights[name].shape)}. Give the sizes it was trained with."
            )
        stepper.main.restore(name, tensor)


def restore(stepper: Stepper, folder: Path, identity: Identity) -> RunProgress:
    """Everything, so that the next step is the one an uninterrupted run would take.

    Raises CheckpointError when the run is not the one that wrote the checkpoint.
    """
    training = read_training(folder)
    differences = identity.differences(training["identity"])
    if differences:
        raise CheckpointError(
            f"{folder} cannot be continued with these settings: {'; '.join(differences)}. "
            f"Use another --save, or --finetune --load {folder} to take over its weights only."
        )
    restore_weights(stepper, folder)
    # There is no state while fp16 has skipped every step.
    if (folder / "optimizer.index.json").is_file():
        stepper.optimizer.restore(read_tensors(folder, "optimizer"))
    restore_random_state(read_tensors(folder, "random"), stepper.device)
    stepper.loss_scale = stepper.loss_scale.restored(training["loss_scale"])
    return RunProgress.from_dict(training["progress"])


def read_training(folder: Path) -> dict[str, Any]:
    """``training.json``. Raises CheckpointError."""
    path = folder / "training.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not {"progress", "loss_scale", "identity"} <= set(data):
            raise CheckpointError(f"{folder} holds weights only; use --finetune to start from it.")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not readable: {error}.") from error
    return dict(data)
