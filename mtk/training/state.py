"""All state of a run to and from a checkpoint: weights, optimizer, random, counters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtk.checkpoint.load import check_names
from mtk.checkpoint.sharded import Block, read_block
from mtk.checkpoint.tensors import read_index, read_tensors
from mtk.errors import CheckpointError
from mtk.parallel.rng import stream_seed
from mtk.training.progress import RunProgress
from mtk.training.random_state import random_state, restore_random_state
from mtk.training.step import Stepper

# The history of delayed FP8 scaling begins so, beside the states of generators: both are a
# rank's own.
SCALES = "float8.amaxes."


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to be continued.

    data: digest of the training data and its order; tokenizer: fingerprint or None; base:
    digest of the weights that finetuning began from.
    """

    data: str
    tokenizer: str | None
    seed: int
    precision: str
    base: str | None = None

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        return [
            f"{name} was {saved.get(name)!r}, now {value!r}"
            for name, value in vars(self).items()
            if saved.get(name) != value
        ]


def training_record(stepper: Stepper, progress: RunProgress, identity: Identity) -> dict[str, Any]:
    """What ``training.json`` holds; ``layout`` only where several ranks trained."""
    record: dict[str, Any] = {
        "progress": progress.to_dict(),
        "loss_scale": stepper.loss_scale.to_dict(),
        "identity": vars(identity),
    }
    if stepper.ranks.distributed:
        record["layout"] = _streams(stepper)
    return record


def _streams(stepper: Stepper) -> dict[str, Any] | None:
    """The layout as far as it decides which ranks draw the same random numbers."""
    if not stepper.ranks.distributed:
        return None
    return {**vars(stepper.ranks.dims), "sequence_parallel": stepper.sequence_parallel}


def blocks(stepper: Stepper) -> dict[str, dict[str, Block]]:
    """The blocks this rank writes, by index: model, optimizer, random."""
    model, optimizer = {}, {}
    for name, weight in stepper.main.weights.items():
        piece = stepper.pieces[name]
        if piece.owner:
            model[name] = Block(weight, piece.shape, piece.offset)
    for name, buffer in stepper.buffers.items():
        piece = stepper.pieces[name]
        if piece.owner:
            model[name] = Block(buffer, piece.shape, piece.offset)
    for key, tensor in stepper.optimizer.state_tensors().items():
        kind, name = key.split(".", 1)
        piece = stepper.pieces[name]
        # A count of steps belongs to the whole parameter: the rank of its first block writes it.
        if kind == "step" and piece.owner and not any(piece.offset):
            optimizer[key] = Block(tensor, (), ())
        elif kind != "step" and piece.owner:
            optimizer[key] = Block(tensor, piece.shape, piece.offset)
    own = random_state(stepper.device)
    if stepper.scales is not None:
        own[stepper.scales.key] = stepper.scales.amaxes_HR
    random = {
        f"{_prefix(stepper)}{name}": Block(tensor, tuple(tensor.shape), (0,) * tensor.ndim)
        for name, tensor in own.items()
    }
    return {"model": model, "optimizer": optimizer, "random": random}


def _prefix(stepper: Stepper) -> str:
    return f"rank{stepper.ranks.rank:05}." if stepper.ranks.distributed else ""


def restore_weights(stepper: Stepper, folder: Path) -> None:
    """The weights that are trained, strictly by name and shape, in any layout. Raises
    CheckpointError."""
    entries = read_index(folder, "model")
    shapes = {**stepper.shapes, **stepper.placed.buffer_shapes}
    check_names(set(entries), set(shapes), folder)
    for name, shape in shapes.items():
        if tuple(entries[name]["shape"]) != shape:
            raise CheckpointError(
                f"{folder}: {name} is {entries[name]['shape']}, the model needs "
                f"{list(shape)}. Give the sizes it was trained with."
            )
    for name in (*stepper.main.weights, *stepper.buffers):
        piece = stepper.pieces[name]
        block = read_block(folder, name, entries[name], piece.offset, piece.size)
        if name in stepper.buffers:
            stepper.buffers[name].copy_(block)
        else:
            stepper.main.restore(name, block)
    stepper.passes.refresh()


def restore_optimizer(stepper: Stepper, folder: Path) -> None:
    """Moments and step counts of this rank's weights. Raises CheckpointError."""
    # There is no state while fp16 has skipped every step.
    if not (folder / "optimizer.index.json").is_file():
        return
    entries = read_index(folder, "optimizer")
    stepper.optimizer.check_names(set(entries), set(stepper.shapes))
    tensors: dict[str, Tensor] = {}
    for key in stepper.optimizer.state_names():
        kind, name = key.split(".", 1)
        piece = stepper.pieces[name]
        region = ((), ()) if kind == "step" else (piece.offset, piece.size)
        tensors[key] = read_block(folder, key, entries[key], *region)
    stepper.optimizer.restore(tensors)


def restore_random(stepper: Stepper, folder: Path, training: Mapping[str, Any], seed: int) -> None:
    """The generators' states, and the history of delayed scaling, where the layout is the one
    that saved them; else new streams, and a history that begins anew."""
    ranks = stepper.ranks
    if training.get("layout") == _streams(stepper):
        prefix = _prefix(stepper)
        names = [name for name in read_index(folder, "random") if name.startswith(prefix)]
        state = read_tensors(folder, "random", names)
        restored = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        histories = {name for name in restored if name.startswith(SCALES)}
        amaxes = {name: restored.pop(name) for name in histories}
        if stepper.scales is not None and stepper.scales.key in amaxes:
            stepper.scales.restore(amaxes[stepper.scales.key])
        restore_random_state(restored, stepper.device)
    else:
        step = int(training["progress"]["step"])
        torch.manual_seed(stream_seed(seed, ranks, stepper.sequence_parallel, step))


def restore(stepper: Stepper, folder: Path, identity: Identity) -> RunProgress:
    """Everything, so that the next step is the one an uninterrupted run would take.

    Raises CheckpointError when the run is not the one that wrote the checkpoint.
    """
    training = read_training(folder)
    differences = identity.differences(training["identity"])
    if differences:
        anew = "--finetune --load" if identity.base is None else "--pretrained-checkpoint"
        raise CheckpointError(
            f"{folder} cannot be continued with these settings: {'; '.join(differences)}. "
            f"Use another --save, or that with {anew} {folder} to take over its weights only."
        )
    restore_weights(stepper, folder)
    restore_optimizer(stepper, folder)
    restore_random(stepper, folder, training, identity.seed)
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
