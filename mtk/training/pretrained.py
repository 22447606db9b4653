"""Weights that finetuning begins from: a native checkpoint or a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtk.artifacts import InputRecord, verify
from mtk.config.model import ModelConfig
from mtk.convert.lazy import Tensors
from mtk.convert.open_model import has_tokenizer, read_native, tokenizer_folder
from mtk.convert.source import Source, find_source
from mtk.errors import CheckpointError
from mtk.models.init import initial_value
from mtk.models.lora import is_adapter
from mtk.parallel.apply import Values
from mtk.tokenizers import Tokenizer, load_tokenizer
from mtk.training.step import Stepper

ROLE = "initial model"
# Parameters of BERT's heads: of a task, and what only pretraining needs.
POOLER = "pooler."
HEADS = (POOLER, "classifier.")
PRETRAINING_HEADS = ("transform.", "output_bias", "order.")


@dataclass(frozen=True)
class Pretrained:
    """source: where the weights lie. model: what they are the weights of. tensors: all of
    them under native names, read when asked for."""

    source: Source
    model: ModelConfig
    tensors: Tensors

    def adds(self, name: str) -> bool:
        """Whether finetuning may begin a parameter anew: of adapters, or of the head of a task."""
        return is_adapter(name) or name.startswith(HEADS)

    def drops(self, name: str) -> bool:
        """Whether the head of a task takes the place of a parameter."""
        return self.model.family == "bert" and name.startswith(PRETRAINING_HEADS)

    @property
    def path(self) -> str:
        return str(self.source.folder)

    def records(self) -> list[InputRecord]:
        """For manifests; a foreign directory is hashed, a native checkpoint checked."""
        if self.source.artifact is not None:
            # Training on from weights that changed on disk would go unnoticed.
            verify(self.source.artifact)
        return self.source.inputs(ROLE)

    def tokenizer(self) -> Tokenizer:
        """The model's own. Raises CheckpointError if it has none."""
        folder = tokenizer_folder(self.source.kind, self.source.folder)
        if not has_tokenizer(folder):
            raise CheckpointError(
                f"{self.path} has no tokenizer: it was trained on ids alone, or its tokenizer "
                f"files were left out. Finetuning on text needs a checkpoint with one."
            )
        return load_tokenizer(folder)


def open_pretrained(path: str) -> Pretrained:
    """Look into ``--pretrained-checkpoint``. Raises ArtifactError or a kind of it."""
    source = find_source(path)
    if source.kind == "quantized":
        raise CheckpointError(
            f"{path} is quantised, and its weights cannot be trained. Finetune what it was made "
            f"from (mtk lineage shows it)."
        )
    model, tensors = read_native(source)
    return Pretrained(source, model, tensors)


def initial_values(base: Pretrained, model: ModelConfig, seed: int) -> Values:
    """Initial weights where ``base`` has none; the others are restored from it."""
    return partial(_value, frozenset(base.tensors), model, seed)


def _value(
    restored: frozenset[str], model: ModelConfig, seed: int, name: str, shape: tuple[int, ...]
) -> Tensor:
    if name in restored:
        return torch.zeros(()).expand(shape)
    return initial_value(name, shape, model, seed)


def restore_pretrained(stepper: Stepper, base: Pretrained) -> set[str]:
    """This rank's part of the weights; returns the names of those that begin anew. Raises
    CheckpointError where they are not the model's."""
    shapes = {**stepper.placed.shapes, **stepper.placed.buffer_shapes}
    fresh = {name for name in shapes if name not in base.tensors and base.adds(name)}
    missing = sorted(set(shapes) - set(base.tensors) - fresh)
    unread = sorted(name for name in set(base.tensors) - set(shapes) if not base.drops(name))
    if missing or unread:
        raise CheckpointError(
            f"{base.path} does not fit the model: missing {missing[:5]}, unknown {unread[:5]} "
            f"(first five)."
        )
    for name, piece in stepper.pieces.items():
        if name in fresh:
            continue
        whole = base.tensors[name]
        if tuple(whole.shape) != shapes[name]:
            raise CheckpointError(
                f"{base.path}: {name} is {list(whole.shape)}, the model needs {list(shapes[name])}."
            )
        if name in stepper.buffers:
            stepper.buffers[name].copy_(piece.cut(whole))
        else:
            stepper.main.restore(name, piece.cut(whole))
    stepper.passes.refresh()
    return fresh
