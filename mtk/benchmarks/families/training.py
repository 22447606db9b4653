"""The pretraining of a family's tiny model on the text, and how low its loss comes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.benchmarks.families.corpus import Corpus, Stages
from mtk.config import make
from mtk.config.family_samples import FamilySample
from mtk.config.pretrain import PretrainConfig
from mtk.session import Session
from mtk.training.data import with_vocabulary
from mtk.training.metrics import read_metrics
from mtk.training.opened_data import open_data

# Steps that a point of the curve is the mean of; the last point is held against the bound.
POINT = 10


@dataclass(frozen=True)
class Curve:
    """points: step and mean training loss of the steps since the one before, nats a token."""

    points: list[tuple[int, float]]
    bound: float
    seconds: float

    @property
    def last(self) -> float:
        return self.points[-1][1]

    @property
    def failures(self) -> list[str]:
        if self.last < self.bound:
            return []
        step = self.points[-1][0]
        return [f"overfit: loss {self.last:.3f} after {step} steps, bound {self.bound:g}"]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Curve:
        """What :meth:`fields` gave."""
        points = [(step, loss) for step, loss in fields["curve"]]
        return cls(points, fields["bound"], fields["seconds"])

    def fields(self) -> dict[str, Any]:
        """For machines."""
        points = [[step, round(loss, 5)] for step, loss in self.points]
        return {
            "bound": self.bound,
            "last": self.last,
            "seconds": round(self.seconds, 1),
            "curve": points,
        }


def training(sample: FamilySample, corpus: Corpus, save: Path, **changes: Any) -> PretrainConfig:
    """The run of ``mtk pretrain`` for a family; its vocabulary is that of the data."""
    values = {
        **sample.options,
        "data_path": [corpus.prefix(sample.data)],
        "split": "1,0,0",
        "micro_batch_size": 8,
        "global_batch_size": 8,
        "train_iters": sample.steps,
        "lr_decay_style": "cosine",
        "lr_warmup_fraction": 0.05,
        "log_interval": POINT,
        "eval_iters": 0,
        "device": "cpu",
        "num_threads": 1,
        "plots": False,
        "save": str(save),
        **changes,
    }
    config = make(PretrainConfig, **values)
    return with_vocabulary(config, open_data(config.data))


def overfit(config: PretrainConfig, bound: float, stages: Stages, session: Session) -> Curve:
    """Train to the end. Raises what the stage raises."""
    started = time.perf_counter()
    stages.pretrain(config, session)
    seconds = time.perf_counter() - started
    found = read_metrics(Path(config.checkpoint.save) / "metrics.jsonl")
    points = [(r["step"], r["loss"]) for r in found if r["event"] == "train"]
    return Curve(points, bound, seconds)
