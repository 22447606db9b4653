"""The stage on small models, and the slowest correct computation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtk.artifacts import Artifact
from mtk.config import make
from mtk.config.evaluate import EvaluateConfig
from mtk.convert.open_model import OpenedModel
from stages.evaluate import run
from tests.convert.models import quiet

CONTEXT = 24


def evaluate(native: Path, data: Path, folder: Path, **changes: Any) -> Artifact:
    values: dict[str, Any] = {
        "load": str(native),
        "task": "WIKITEXT103",
        "valid_data": str(data),
        "output": str(folder / "out"),
        "detokenizer": "none",
    }
    return run(make(EvaluateConfig, **(values | changes)), quiet())


def results(artifact: Artifact) -> dict[str, Any]:
    return dict(json.loads((artifact.path / "results.json").read_text()))


def items(artifact: Artifact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.path / "items.jsonl").read_text().splitlines()]


def log_prob(opened: OpenedModel, context: list[int], target: int) -> float:
    logits: Tensor = opened.model(torch.tensor([context]))[0, -1].double()
    return logits.log_softmax(-1)[target].item()


def brute_force(opened: OpenedModel, tokens: list[int], step: int) -> float:
    """-ln p of every target, one forward pass each, with the context its window gives."""
    total = 0.0
    for target in range(1, len(tokens)):
        prediction = target - 1
        late = max(0, math.ceil((prediction - CONTEXT + 1) / step))
        total -= log_prob(opened, tokens[late * step : target], tokens[target])
    return total
