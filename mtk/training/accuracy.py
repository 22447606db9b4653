"""Accuracy of a task's head on held-out data, each sample counted once on any number of ranks.

Shape suffixes: B samples, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtk.evaluation.classification import ClassificationData
from mtk.log import Reporter
from mtk.parallel.collectives import gather_objects
from mtk.training.batch import LocalBatch
from mtk.training.data import Share, held_out
from mtk.training.head_data import HeadSamples
from mtk.training.objective import Classification
from mtk.training.step import Stepper

# place in the file, loss in nats, probability of each class
Scored = tuple[int, float, list[float]]


@dataclass(frozen=True)
class AccuracyJudge:
    """What the loop calls in place of a held-out loss.

    data: by name. predictions: folder for a file of JSON lines for each, of the newest
    evaluation.
    """

    data: dict[str, ClassificationData]
    share: Share
    predictions: Path
    reporter: Reporter

    def __call__(self, stepper: Stepper, step: int) -> dict[str, Any]:
        """Loss and accuracy over all data, and the accuracy of each; the same on every rank."""
        right = total = 0
        nats = 0.0
        figures: dict[str, float] = {}
        for name, data in self.data.items():
            scored = self._scored(stepper, data)
            correct = sum(_choice(values) == data.label(k) for k, _, values in scored)
            self._tell(name, correct, len(scored))
            figures[f"accuracy.{name}"] = correct / len(scored)
            right, total = right + correct, total + len(scored)
            nats += sum(loss for _, loss, _ in scored)
            if stepper.ranks.world.first:
                write_predictions(self.predictions / f"{name}.jsonl", data, scored, step)
        if len(self.data) > 1:
            self._tell("overall", right, total)
        return {"loss": nats / total, "accuracy": right / total, "samples": total, **figures}

    def _tell(self, name: str, correct: int, total: int) -> None:
        share = 100 * correct / total
        self.reporter.info(f"{name}: correct / total = {correct} / {total} = {share:.4f} %")

    def _scored(self, stepper: Stepper, data: ClassificationData) -> list[Scored]:
        """Every sample in the order of its file, on every rank."""
        objective = stepper.passes.objective
        assert isinstance(objective, Classification)
        samples = HeadSamples([data], stepper.placed.parts[0].config.vocab_size)
        batches = held_out(samples, len(data), self.share)
        assert batches is not None
        found: list[Scored] = []

        def score(outputs: Any, batch: LocalBatch) -> None:
            if not stepper.ranks.tp.first:
                return
            real = batch.extra["counted"] > 0
            (losses_B,) = objective.losses(outputs, batch)
            columns = (batch.extra["place"], losses_B, objective.logits(outputs).softmax(-1))
            rows = (column[real].cpu().tolist() for column in columns)
            found.extend(zip(*rows, strict=True))

        for batch in batches():
            stepper.passes.evaluate(batch.micro_batches, score)
        each = gather_objects(found, stepper.ranks.world, "accuracy.samples")
        return sorted(scored for part in each for scored in part)


def _choice(probabilities: Sequence[float]) -> int:
    return int(torch.tensor(probabilities).argmax())


def write_predictions(
    path: Path, data: ClassificationData, scored: Sequence[Scored], step: int
) -> None:
    """One line a sample: uid, label, predicted label, probabilities."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for place, _, probabilities in scored:
            record = {
                "uid": data.uid(place),
                "label": data.label(place),
                "predicted": _choice(probabilities),
                "probabilities": probabilities,
                "step": step,
            }
            stream.write(json.dumps(record) + "\n")
    temporary.replace(path)
