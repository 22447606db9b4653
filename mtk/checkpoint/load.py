"""A model from a native checkpoint, for every stage that only reads weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mtk.artifacts import Artifact, open_artifact
from mtk.checkpoint.steps import checkpoint_folder
from mtk.checkpoint.tensors import iterate_tensors, read_index
from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.errors import CheckpointError, MtkError
from mtk.models.buffers import kept_tensors
from mtk.models.build import build_on_meta
from mtk.models.gpt import GPT

MODEL_FORMAT, MODEL_VERSION = "mtk-model", 1


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what belongs to it.

    tokenizer_folder: None for a checkpoint that was trained without a tokenizer.
    """

    model: GPT
    config: ModelConfig
    artifact: Artifact
    tokenizer_folder: Path | None


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load weights from a checkpoint folder, or the newest step inside ``path``.

    Raises CheckpointError when files are missing or names or shapes do not fit.
    """
    folder = checkpoint_folder(path)
    artifact = open_artifact(folder, "checkpoint")
    config = read_model_config(folder)
    if config.lora.lora_rank is not None:
        raise CheckpointError(
            f"{folder} holds adapters only. Merge them with their model: mtk convert --load "
            f"{folder} --to native --save DIR."
        )
    model = empty_model(config, dtype=dtype, device=device)
    load_weights(model, folder)
    tokenizer = folder / "tokenizer"
    return LoadedModel(model.eval(), config, artifact, tokenizer if tokenizer.is_dir() else None)


def empty_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> GPT:
    """The module with memory for its weights but nothing in it yet; buffers are right."""
    model = build_on_meta(config).to_empty(device=device).to(dtype)
    model.fill_tables(torch.device(device))
    return model


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy every tensor of the checkpoint into the parameter (or the buffer that is kept) of its
    name, strictly."""
    parameters = kept_tensors(model)
    check_names(set(read_index(folder, "model")), set(parameters), folder)
    for name, tensor in iterate_tensors(folder, "model"):
        copy_into(parameters[name], tensor, name, folder)


def check_names(found: set[str], wanted: set[str], folder: Path) -> None:
    """Both directions: no weight unread, no parameter unwritten. Raises CheckpointError."""
    if found != wanted:
        missing, extra = sorted(wanted - found)[:5], sorted(found - wanted)[:5]
        raise CheckpointError(
            f"{folder} does not fit the model: missing {missing}, unknown {extra} (first five). "
            f"The sizes and kinds given must be those the checkpoint was trained with."
        )


@torch.no_grad()
def copy_into(parameter: Tensor, tensor: Tensor, name: str, folder: Path) -> None:
    """Copy with a check of the shape. Raises CheckpointError."""
    if parameter.shape != tensor.shape:
        raise CheckpointError(
            f"{folder}: {name} is {list(tensor.shape)}, the model needs {list(parameter.shape)}."
        )
    parameter.copy_(tensor)


def read_model_config(folder: Path) -> ModelConfig:
    """The model's configuration from ``model.json``. Raises CheckpointError."""
    path = folder / "model.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != MODEL_FORMAT or data["version"] > MODEL_VERSION:
            raise CheckpointError(
                f"{path} is {data['format']} version {data['version']}; this mtk reads "
                f"{MODEL_FORMAT} up to version {MODEL_VERSION}."
            )
        return make(ModelConfig, **data["model"])
    except (OSError, ValueError, KeyError, TypeError, MtkError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a readable model description: {error}.") from error
