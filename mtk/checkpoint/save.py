"""Write one native checkpoint as an artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mtk.checkpoint.load import MODEL_FORMAT, MODEL_VERSION
from mtk.checkpoint.tensors import write_tensors
from mtk.config import to_dict
from mtk.config.files import write_config
from mtk.config.model import ModelConfig


@dataclass(frozen=True)
class CheckpointContent:
    """What a checkpoint holds. training: plain data (counters, schedule, scaler).

    optimizer and random may be empty for a checkpoint of weights only; weights where ranks
    write their own blocks beside it (:mod:`mtk.checkpoint.sharded`).
    """

    model_config: ModelConfig
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    random: Mapping[str, Tensor] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_folder: Path | None = None


def write_content(
    folder: Path, content: CheckpointContent, config: Any, max_shard_size: int = 2_000_000_000
) -> None:
    """Write a checkpoint's files, without the marker that makes it one."""
    _write_json(
        folder / "model.json",
        {
            "format": MODEL_FORMAT,
            "version": MODEL_VERSION,
            "model": to_dict(content.model_config),
        },
    )
    write_config(to_dict(config), folder / "config.yaml")
    if content.weights:
        write_tensors(folder, "model", content.weights, max_shard_size)
    if content.optimizer:
        write_tensors(folder, "optimizer", content.optimizer, max_shard_size)
    if content.random:
        write_tensors(folder, "random", content.random)
    _write_json(folder / "training.json", dict(content.training))
    if content.tokenizer_folder is not None:
        shutil.copytree(content.tokenizer_folder, folder / "tokenizer")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
