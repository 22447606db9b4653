"""From the path of ``--load`` to a model, its tokenizer and its lineage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtk.artifacts import Artifact
from mtk.checkpoint import load_model
from mtk.errors import CheckpointError
from mtk.models.gpt import GPT
from serving.text import TextCodec


@dataclass(frozen=True)
class Served:
    """lineage: the chain of digests as plain data; None if the model is no mtk artifact."""

    model: GPT
    codec: TextCodec
    lineage: dict[str, Any] | None


def open_served(path: str, *, dtype: torch.dtype, device: str) -> Served:
    """Raises ArtifactError if there is no model, or it has no tokenizer."""
    loaded = load_model(path, dtype=dtype, device=device)
    if loaded.tokenizer_folder is None:
        raise CheckpointError(
            f"{path} has no tokenizer, so it cannot be served: it was trained on mock data."
        )
    from mtk.tokenizers import load_tokenizer

    codec = load_tokenizer(Path(loaded.tokenizer_folder))
    return Served(loaded.model, codec, lineage_of(loaded.artifact))


def lineage_of(artifact: Artifact | None) -> dict[str, Any] | None:
    if artifact is None:
        return None
    return {
        "kind": artifact.kind,
        "path": str(artifact.path),
        "digest": artifact.digest,
        "stage": artifact.stage,
        "metrics": dict(artifact.metrics),
        "versions": dict(artifact.versions),
        "inputs": [record.to_dict() for record in artifact.inputs],
    }
