"""Small runs of ``mtk finetune`` in one process or on ranks of the pool, for the tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps
from mtk.config import make
from mtk.config.finetune import FinetuneConfig
from mtk.log import Reporter
from mtk.parallel.compat import fitting_warnings
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.session import Session
from mtk.training.finetune import finetune_job, finetuned_model
from mtk.training.metrics import read_metrics
from mtk.training.pretrained import open_pretrained
from mtk.training.run import run_job
from tests.parallel.ranks import run_ranks

QUIET = Session(Reporter(quiet=True))
SIZES: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "train_iters": 4,
    "lr": 3e-3,
    "log_interval": 1,
    "save_interval": 100,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}
# Two ranks each, and one mixture.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-zero-bubble": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble"},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
    "dp2-optimizer": {"data_parallel_sharding": "optimizer"},
    "dp2-full": {"data_parallel_sharding": "full"},
}


def layouts(*quick: str, without: str = "-") -> list[Any]:
    """Names of layouts; all but the ``quick`` ones are slow tests."""
    names = [name for name in LAYOUTS if not name.startswith(without)]
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def options(task: str, base: Path, save: Path, **changes: Any) -> FinetuneConfig:
    own = {"task": task, "pretrained_checkpoint": str(base), "save": str(save)}
    return make(FinetuneConfig, **{**SIZES, **own, **changes})


def train_on_rank(rank: int, config: FinetuneConfig, session: Session = QUIET) -> dict[str, Any]:
    """What ``stages.finetune`` does in each rank; returns the metrics of the checkpoint."""
    world = config.parallel.nproc
    base = open_pretrained(config.pretrained_checkpoint)
    core = config.core(finetuned_model(config, base))
    with fitting_warnings(first=rank == 0):
        ranks = Ranks()
        if world > 1:
            ranks = make_ranks(
                Dims.of(core.parallel, world),
                rank=rank,
                device=torch.device("cpu"),
                kv_groups=core.model.query_groups,
                sharded=core.parallel.data_parallel_sharding != "replicate",
            )
        return dict(run_job(finetune_job(config, base, session.reporter), session, ranks).metrics)


def train(config: FinetuneConfig) -> list[dict[str, Any]]:
    """Figures of a run on as many ranks as it asks for, from its log."""
    if config.parallel.nproc == 1:
        train_on_rank(0, config)
    else:
        run_ranks(config.parallel.nproc, train_on_rank, config)
    return figures(Path(config.checkpoint.save))


def figures(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def assert_close(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float) -> None:
    """Same events in the same order with the same numbers."""
    assert [(r["event"], r["step"], [*r]) for r in one] == [
        (r["event"], r["step"], [*r]) for r in other
    ]
    for a, b in zip(one, other, strict=True):
        for key, value in a.items():
            if isinstance(value, float):
                assert abs(value - b[key]) <= rel * max(abs(b[key]), 1e-9), (key, value, b[key])


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def weight_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of the newest checkpoint."""
    newest = folder / f"step_{complete_steps(folder)[-1]:08}"
    return {p.name: sha256_file(p) for p in sorted(newest.glob("*.safetensors"))}
