"""The stage: learns, continues bit for bit, refuses what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps, load_model
from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.data.indexed_dataset import IndexedDatasetWriter
from mtk.errors import CheckpointError, ConfigError, DataError, GateError
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.metrics import read_metrics
from mtk.training.resume import exclusive
from stages.pretrain import run

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 50,
    "split": "90,5,5",
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 30,
    "lr": 1e-2,
    "lr_warmup_iters": 3,
    "lr_decay_style": "cosine",
    "hidden_dropout": 0.1,  # makes the random state part of the resume
    "attention_dropout": 0.1,
    "log_interval": 5,
    "eval_interval": 10,
    "eval_iters": 2,
    "save_interval": 4,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}
QUIET = Session(Reporter(quiet=True))


def config(folder: Path, **changes: Any) -> PretrainConfig:
    return make(PretrainConfig, **options(folder, **changes))


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run below ``folder``, on a dataset that every run shares."""
    return {**BASE, "data_path": [str(dataset())], **changes, "save": str(folder)}


@cache
def dataset() -> Path:
    """300 documents in which each token is its forerunner plus 1, 2 or 3 (mod 50)."""
    prefix = Path(tempfile.mkdtemp()) / "walk_text_document"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in rng.integers(5, 60, 300):
            tokens = np.cumsum(rng.integers(1, 4, length)) % 50
            writer.add_document(tokens, [len(tokens)])
    return prefix


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file of the newest checkpoint."""
    newest = folder / f"step_{complete_steps(folder)[-1]:08}"
    return {p.name: sha256_file(p) for p in sorted(newest.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    run(config(folder), QUIET)
    return folder


def test_learns_and_leaves_what_it_should(straight: Path) -> None:
    assert complete_steps(straight) == [28, 30]
    records = read_metrics(straight / "metrics.jsonl")
    evaluations = [r["loss"] for r in records if r["event"] == "eval"]
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0]
    assert {"train", "eval", "test"} == {r["event"] for r in records}
    manifest = json.loads((straight / "step_00000030" / "artifact.json").read_text())
    assert manifest["metrics"]["test"]["loss"] == next(
        r["loss"] for r in records if r["event"] == "test"
    )
    assert load_model(straight).config.vocab_size == 50


def test_held_out_samples_are_each_counted_once(straight: Path) -> None:
    """The test split has fewer samples than were asked for: all of them, none twice."""
    tests = [r for r in read_metrics(straight / "metrics.jsonl") if r["event"] == "test"]
    asked = BASE["eval_iters"] * BASE["global_batch_size"] * BASE["seq_length"]
    assert tests[0]["tokens"] == asked
    small = held_out_samples(straight, eval_iters=500)
    assert 16 * 8 < small < 16 * 100 and small % 16 == 0


def held_out_samples(folder: Path, **changes: Any) -> float:
    """Tokens of the test split's evaluation in a fresh run of one step."""
    target = folder.parent / f"{folder.name}-heldout"
    run(config(target, train_iters=4, **changes), QUIET)
    records = read_metrics(target / "metrics.jsonl")
    return float(next(r["tokens"] for r in records if r["event"] == "test"))


def test_finished_run_is_skipped(straight: Path) -> None:
    before = (straight / "step_00000030" / "artifact.json").stat().st_mtime_ns
    artifact = run(config(straight), QUIET)
    assert artifact.path == straight / "step_00000030"
    assert artifact.marker.stat().st_mtime_ns == before


@pytest.mark.parametrize("killed_at", [1, 4, 7, 10, 29])
def test_continues_bit_for_bit(straight: Path, tmp_path: Path, killed_at: int) -> None:
    """State after ``killed_at`` steps is what a kill there would leave on disk."""
    stopped = StopAfter(killed_at)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path), Session(stopped))
    assert complete_steps(tmp_path) == list(range(4, killed_at + 1, 4))[-2:]
    run(config(tmp_path), QUIET)
    assert weights(tmp_path) == weights(straight)
    assert untimed(tmp_path) == untimed(straight)


class StopAfter(Reporter):
    """Raises in the middle of a run, after ``steps`` steps, without any chance to save."""

    def __init__(self, steps: int) -> None:
        super().__init__(quiet=True)
        self.left = steps

    def progress(self, *args: Any, **kwargs: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def bar() -> Any:
            yield self

        return bar()

    def update(self, **fields: object) -> None: ...

    def advance(self, amount: float = 1, **fields: object) -> None:
        if amount:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


def untimed(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def command(folder: Path, **changes: Any) -> list[str]:
    given = options(folder, **changes)
    flags = [f"--set={name}={json.dumps(value)}" for name, value in given.items()]
    return [sys.executable, "-m", "mtk", "pretrain", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_real_signals(straight: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The program is hit at an arbitrary moment; the same command finishes the same run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path), env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not complete_steps(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number != signal.SIGKILL and process.returncode != 0:
        assert process.returncode == 130 and b"continues from there" in errors
    subprocess.run(command(tmp_path), env=environment, check=True, capture_output=True)
    assert weights(tmp_path) == weights(straight)


def test_torn_checkpoint_is_passed_over(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    last = next((tmp_path / "run" / "step_00000030").glob("model-*"))
    last.write_bytes(last.read_bytes()[:-3])
    run(config(tmp_path / "run"), QUIET)
    assert weights(tmp_path / "run") == weights(straight)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seed": 1}, "seed"),
        ({"seq_length": 8}, "data"),
        ({"precision": "bf16"}, "precision"),
        ({"data_order": "megatron"}, "data"),
    ],
)
def test_another_run_is_not_continued(
    straight: Path, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(CheckpointError, match=part):
        run(config(tmp_path / "run", train_iters=40, **changes), QUIET)


def test_another_model_is_not_continued(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(CheckpointError, match="trained with"):
        run(config(tmp_path / "run", train_iters=40, hidden_size=64), QUIET)


def test_finished_run_with_other_options_is_in_the_way(straight: Path) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.lr"):
        run(config(straight, lr=1e-3), QUIET)


def test_force_starts_over(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    run(config(tmp_path / "run", seed=9), Session(Reporter(quiet=True), force=True))
    assert weights(tmp_path / "run") != weights(straight)


def test_force_begins_from_load(straight: Path, tmp_path: Path) -> None:
    """It deletes what is in --save; --load is not forgotten, and never among the deleted."""
    force = Session(Reporter(quiet=True), force=True)
    changes = {"load": str(straight), "finetune": True, "train_iters": 1, "lr_warmup_iters": 0}
    artifact = run(config(tmp_path, **changes), force)
    assert [record.role for record in artifact.inputs if record.kind == "checkpoint"] == [
        "initial model"
    ]
    before = weights(straight)
    with pytest.raises(CheckpointError, match="--force deletes the checkpoints"):
        run(config(straight, **changes), force)
    assert weights(straight) == before


def test_longer_training_sees_the_same_data(straight: Path, tmp_path: Path) -> None:
    """Order by epochs: doubling the length does not change what the first half saw."""
    changes = {"lr_decay_style": "constant"}
    run(config(tmp_path / "short", **changes), QUIET)
    run(config(tmp_path / "long", train_iters=60, **changes), QUIET)
    shutil.copytree(tmp_path / "short", tmp_path / "extended")
    run(config(tmp_path / "extended", train_iters=60, **changes), QUIET)
    assert weights(tmp_path / "extended") == weights(tmp_path / "long")


def test_finetune_takes_weights_only(straight: Path, tmp_path: Path) -> None:
    artifact = run(
        config(tmp_path, load=str(straight), finetune=True, train_iters=4, seed=2), QUIET
    )
    assert artifact.metrics["step"] == 4
    assert [record.role for record in artifact.inputs] == ["training data", "initial model"]


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"family": "bert"}, ConfigError, "family"),
        ({"tensor_model_parallel_size": 2}, ConfigError, "multiple of TP x PP x CP = 2"),
        ({"recompute_granularity": "full"}, ConfigError, "needs a method"),
        (
            {"train_iters": None, "train_samples": 3, "lr_warmup_iters": None},
            ConfigError,
            "global batch",
        ),
        ({"load": "/nonexistent"}, CheckpointError, "nonexistent"),
        ({"data_path": ["/nonexistent/d"]}, DataError, "nonexistent"),
        ({"seq_length": 16000}, DataError, "fewer than one sample"),
        ({"split": "1,0.001,0"}, DataError, "valid"),
        ({"vocab_size": None}, ConfigError, "vocab_size"),
        ({"lr_warmup_iters": 40}, ConfigError, "warm-up"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_leave_nothing(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        run(config(tmp_path / "run", **changes), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_ids_beyond_the_vocabulary_are_named_when_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="40"):
        run(config(tmp_path, vocab_size=40), QUIET)
    assert complete_steps(tmp_path) == []


def test_force_with_bad_data_loses_nothing(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    force = Session(Reporter(quiet=True), force=True)
    with pytest.raises(DataError):
        run(config(tmp_path / "run", seq_length=16000), force)
    assert weights(tmp_path / "run") == weights(straight)


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(CheckpointError, match="another run"):
        run(config(tmp_path), QUIET)
    run(config(tmp_path, train_iters=4), QUIET)


def test_divergence_is_refused_and_the_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"is (nan|inf)"):
        run(config(tmp_path, lr=1e30, clip_grad=0, lr_warmup_iters=None, save_interval=2), QUIET)
    for step in complete_steps(tmp_path):
        assert torch.isfinite(torch.tensor(step))


def test_rampup_and_plots(tmp_path: Path) -> None:
    changes = {
        "train_iters": None,
        "train_samples": 60,
        "rampup_batch_size": [2, 2, 20],
        "lr_warmup_iters": None,
        "plots": True,
        "log_interval": 1,
    }
    run(config(tmp_path, **changes), QUIET)
    samples = [
        r["samples"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["event"] == "train"
    ]
    assert samples[0] == 2 and samples[-1] == 60 and samples[-1] - samples[-2] == 4
    for name in ("loss.png", "throughput.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
