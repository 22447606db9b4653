"""Accuracy of a finetuned BERT on RACE, MNLI or QQP.

Shape suffixes: B samples, C sequences of a sample, S sequence, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.artifacts.hashing import sha256_file
from mtk.config.evaluate import EvaluateConfig
from mtk.config.heads import TASKS
from mtk.convert.open_model import OpenedModel
from mtk.errors import ConfigError, Problem
from mtk.evaluation.classification import ClassificationData
from mtk.evaluation.scoring import BATCH_TOKENS
from mtk.evaluation.task_files import files_of, read_task, unique_names
from mtk.evaluation.tasks import Outcome, require_finite
from mtk.log import Reporter
from mtk.parallel.collectives import gather_objects
from mtk.parallel.groups import Group

DEFINITIONS = {
    "accuracy": "samples whose likeliest class is their label / samples",
    "loss": "mean of -log of the probability of the label, in nats",
}


def head_task(
    config: EvaluateConfig, opened: OpenedModel, world: Group, reporter: Reporter
) -> tuple[Outcome, int]:
    """Figures over all data and of each, and one item a sample; the length of sequences.

    Ranks share the samples. Raises ConfigError for a model without the task's head, DataError.
    """
    task, length = TASKS[config.task], _length(config, opened)
    data = [
        read_task(task, path, opened.tokenizer, length, reporter.warn) for path in config.valid_data
    ]
    batch = _samples_at_once(config, length * task.choices, task.choices)
    figures: dict[str, Any] = {}
    items: list[dict[str, Any]] = []
    lines = []
    for name, one in zip(unique_names(data), data, strict=True):
        found = _items(opened, one, batch, world, reporter)
        correct = sum(item["correct"] for item in found)
        figures[name] = {"accuracy": correct / len(found), "correct": correct, "total": len(found)}
        lines.append(f"{name}: {_share(correct, len(found))}")
        items += [{"data": name, **item} for item in found]
    correct = sum(item["correct"] for item in items)
    losses = [item["loss"] for item in items]
    require_finite(losses, config.dtype)
    if len(data) > 1:
        lines.append(f"overall: {_share(correct, len(items))}")
    overall = {"accuracy": correct / len(items), "correct": correct, "total": len(items)}
    figures = {**overall, "loss": math.fsum(losses) / len(items), "of": figures}
    files = [
        {"file": path.name, "sha256": sha256_file(path)}
        for path in files_of(task, config.valid_data)
    ]
    details = {"data": files, "definitions": DEFINITIONS}
    return Outcome(figures, items, "\n".join(lines), details), length


def _share(correct: int, total: int) -> str:
    return f"correct / total = {correct} / {total} = {100 * correct / total:.4f} %"


def _length(config: EvaluateConfig, opened: OpenedModel) -> int:
    """Raises ConfigError for another head or none, and for more tokens than positions."""
    model = opened.config
    if model.task_head != config.task:
        has = "no head" if model.task_head is None else f"the head of {model.task_head}"
        rule = f"{config.load} has {has}"
        fix = f"Finetune it first: mtk finetune --task {config.task}."
        raise ConfigError([Problem("task", config.task, rule, fix)])
    length = config.seq_length or model.seq_length
    if length > model.positions:
        rule = f"exceeds the {model.positions} positions of the model"
        raise ConfigError([Problem("seq_length", length, rule, f"Nearest: {model.positions}.")])
    return length


def _samples_at_once(config: EvaluateConfig, tokens: int, sequences: int) -> int:
    """tokens, sequences: of one sample."""
    default = BATCH_TOKENS if config.batch_size is None else 2**62
    limits = (
        (config.batch_tokens or default) // tokens,
        (config.batch_size or 2**62) // sequences,
    )
    return max(1, min(limits))


def _items(
    opened: OpenedModel, data: ClassificationData, batch: int, world: Group, reporter: Reporter
) -> list[dict[str, Any]]:
    """Every sample in the order of its file, on every rank. Batches are dealt to the ranks, so
    that none depends on how many there are."""
    starts = range(0, len(data), batch)[world.rank :: world.size]
    found: list[tuple[int, dict[str, Any]]] = []
    with reporter.progress("evaluate", len(data) // world.size, "samples") as bar:
        for start in starts:
            chosen = range(start, min(start + batch, len(data)))
            logits_BK = _logits(opened, data, chosen).float().cpu()
            labels_B = torch.tensor([data.label(k) for k in chosen])
            losses_B = F.cross_entropy(logits_BK, labels_B, reduction="none")
            for row, k in enumerate(chosen):
                found.append((k, _item(data, k, logits_BK[row], losses_B[row])))
            bar.advance(len(chosen))
    each = gather_objects(found, world, "evaluate.samples")
    everything = (pair for part in each for pair in part)
    return [item for _, item in sorted(everything, key=itemgetter(0))]


def _item(data: ClassificationData, k: int, logits_K: Tensor, loss: Tensor) -> dict[str, Any]:
    predicted, label = int(logits_K.argmax()), data.label(k)
    return {
        "uid": data.uid(k),
        "label": label,
        "predicted": predicted,
        "correct": predicted == label,
        "loss": loss.item(),
        "probabilities": logits_K.softmax(-1).tolist(),
    }


@torch.no_grad()
def _logits(opened: OpenedModel, data: ClassificationData, chosen: Sequence[int]) -> Tensor:
    """[B, K] of these samples."""
    samples = [data[k] for k in chosen]
    device = next(opened.model.parameters()).device

    def joined(name: str) -> Tensor:
        rows = torch.cat([torch.from_numpy(getattr(sample, name)) for sample in samples])
        return rows.to(device)

    mask = joined("mask")
    model: Any = opened.model
    outputs = model(joined("text"), types=joined("types") * mask, documents=1 - mask)
    return outputs.reshape(len(samples), -1)  # type: ignore[no-any-return]
