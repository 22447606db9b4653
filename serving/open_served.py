"""From the path of ``--load`` to a model, its tokenizer and its lineage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mtk.artifacts import Artifact
from mtk.convert.open_model import open_model
from mtk.models.gpt import GPT
from mtk.tokenizers import Tokenizer


@dataclass(frozen=True)
class Served:
    """lineage: the chain of digests as plain data; None if the model is no mtk artifact."""

    model: GPT
    tokenizer: Tokenizer
    lineage: dict[str, Any] | None


def open_served(path: str, *, dtype: torch.dtype, device: str) -> Served:
    """A native checkpoint, Hugging Face directory or quantised directory, whose weights stay in
    the bits they have there.

    Raises ArtifactError if there is no model, or it has no tokenizer, ConfigError for one that
    writes no text.
    """
    opened = open_model(path, dtype=dtype, device=device, packed=True)
    opened.require_generator("load", path)
    return Served(opened.model, opened.tokenizer, lineage_of(opened.artifact))


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
