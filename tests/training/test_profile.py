"""``--profile``: what it writes, when, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.profile import SETTLED, profiled
from stages.pretrain import run

OPTIONS: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "vocab_size": 50,
    "mock_data": True,
    "micro_batch_size": 2,
    "train_iters": 9,
    "lr": 1e-2,
    "eval_iters": 0,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}
CPU = torch.device("cpu")


def weights(folder: Path) -> dict[str, str]:
    newest = folder / "step_00000009"
    return {p.name: sha256_file(p) for p in sorted(newest.glob("*.safetensors"))}


def test_a_run_is_the_same_with_it(tmp_path: Path) -> None:
    for name, steps in (("without", 0), ("with", 2)):
        given = make(PretrainConfig, **OPTIONS, save=str(tmp_path / name), profile=steps)
        run(given, Session(Reporter(quiet=True)))
    assert weights(tmp_path / "with") == weights(tmp_path / "without") != {}
    assert not (tmp_path / "without" / "profile").exists()
    folder = tmp_path / "with" / "profile"
    assert sorted(p.name for p in folder.iterdir()) == ["rank_0000.json", "rank_0000.txt"]
    trace = json.loads((folder / "rank_0000.json").read_text())
    steps = [e for e in trace["traceEvents"] if str(e.get("name")).startswith("Optimizer.step")]
    assert len(steps) == 2
    assert "aten::" in (folder / "rank_0000.txt").read_text()


def test_off_is_nothing_at_all(tmp_path: Path) -> None:
    assert profiled(batches, 0, tmp_path, 0, CPU) is batches


@pytest.mark.parametrize("rank", [0, 3])
def test_fewer_batches_than_asked_for(tmp_path: Path, rank: int) -> None:
    taken = list(profiled(batches, 100, tmp_path, rank, CPU)(4))
    assert taken == list(batches(4))
    assert (tmp_path / f"rank_{rank:04d}.txt").exists()


def test_too_short_a_run_leaves_nothing(tmp_path: Path) -> None:
    assert len(list(profiled(batches, 1, tmp_path, 0, CPU)(12 - SETTLED))) == SETTLED
    assert not list(tmp_path.iterdir())


def test_a_stop_on_the_way_keeps_what_there_is(tmp_path: Path) -> None:
    source = profiled(batches, 100, tmp_path, 0, CPU)(0)
    for _ in range(SETTLED + 2):
        next(source)
    source.close()  # type: ignore[attr-defined]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_negative_number_of_steps() -> None:
    with pytest.raises(ConfigError, match="profile"):
        make(PretrainConfig, **OPTIONS, save="x", profile=-1)


def batches(consumed: int) -> Iterator[Any]:
    """Twelve, of which some are consumed."""
    yield from range(consumed, 12)
