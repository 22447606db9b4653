"""The whole stage on several ranks, with a real dataset: figures of one process, one voice,
checkpoints that every other stage reads, interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts import verify_lineage
from mtk.checkpoint import complete_steps, load_model
from mtk.cli.main import main
from mtk.config import make
from mtk.config.evaluate import EvaluateConfig
from mtk.config.pretrain import PretrainConfig
from mtk.log import Reporter
from mtk.parallel.compat import fitting_warnings
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.session import Session
from mtk.training.metrics import read_metrics
from mtk.training.run import run_rank
from stages import evaluate, pretrain
from tests.convert.models import convert_config
from tests.parallel.ranks import run_ranks
from tests.training.test_tokenizer_identity import dataset, write_corpus

pytestmark = pytest.mark.slow

QUIET = Session(Reporter(quiet=True))
FORCE = Session(Reporter(quiet=True), force=True)
BASE: dict[str, Any] = {
    "recipe": "gpt-tiny",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "ffn_hidden_size": 48,
    "seq_length": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "lr": 1e-2,
    "lr_warmup_fraction": 0.0,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 6,
    "eval_interval": 3,
    "eval_iters": 2,
    "save_interval": 4,
    "log_interval": 1,
    "split": "90,5,5",
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}
TP: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": TP,
    "pp2": PP,
    "cp2": {"context_parallel_size": 2},
    "dp2-replicate": {},
    "dp2-optimizer": {"data_parallel_sharding": "optimizer"},
    "dp2-full": {"data_parallel_sharding": "full"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a dataset made with it, and ``one/``: a run in one process."""
    folder = tmp_path_factory.mktemp("home")
    dataset(folder, 300)
    pretrain.run(config(folder, "one"), QUIET)
    return folder


def config(home: Path, name: str, world: int = 1, **changes: Any) -> PretrainConfig:
    return make(PretrainConfig, **(options(home, name) | changes), nproc=world)


def options(home: Path, name: str) -> dict[str, Any]:
    data = {"data_path": [str(home / "v300-data_text_document")]}
    return {**BASE, **data, "save": str(home / name)}


def train_on_rank(rank: int, wanted: PretrainConfig, session: Session) -> dict[str, Any]:
    """What ``stages.pretrain`` does in each rank; returns the metrics of the checkpoint."""
    world = wanted.parallel.nproc
    with fitting_warnings(first=rank == 0):
        ranks = Ranks()
        if world > 1:
            ranks = make_ranks(
                Dims.of(wanted.parallel, world),
                rank=rank,
                device=torch.device("cpu"),
                kv_groups=wanted.model.query_groups,
                state_groups=wanted.model.state_groups,
                sharded=wanted.parallel.data_parallel_sharding != "replicate",
            )
        return dict(run_rank(wanted, session, ranks).metrics)


def train(wanted: PretrainConfig, session: Session = QUIET) -> list[dict[str, Any]]:
    """Metrics of the run, read back from its log."""
    each = run_ranks(wanted.parallel.nproc, train_on_rank, wanted, session)
    assert all(metrics == each[0] for metrics in each)
    return figures(Path(wanted.checkpoint.save))


def figures(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def close(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float) -> bool:
    """Same events in the same order with the same numbers."""
    assert [(r["event"], r["step"], [*r]) for r in one] == [
        (r["event"], r["step"], [*r]) for r in other
    ]
    worst = max(
        abs(a[key] - b[key]) / max(abs(b[key]), 1e-9)
        for a, b in zip(other, one, strict=True)
        for key in a
        if isinstance(a[key], float)
    )
    assert worst <= rel, worst
    return True


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_figure_is_that_of_one_process(home: Path, name: str) -> None:
    assert close(figures(home / "one"), train(config(home, name, 2, **LAYOUTS[name])), 1e-5)
    one, other = (load_model(home / which).model for which in ("one", name))
    x_BS = torch.arange(32).view(2, 16) * 7
    assert torch.allclose(one(x_BS), other(x_BS), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "bf16") for name in LAYOUTS]
    + [(name, "fp16") for name in ("tp2-sp", "pp2", "dp2-replicate", "dp2-full")],
)
def test_lower_precision_follows_fp32(home: Path, name: str, precision: str) -> None:
    scale = {"initial_loss_scale": 1024.0} if precision == "fp16" else {}
    changes = {"precision": precision, "train_iters": 12, "eval_interval": 12, **scale}
    found = train(config(home, f"{precision}-{name}", 2, **changes, **LAYOUTS[name]))
    single = figures(home / "one")
    pairs = [
        (r["loss"], s["loss"])
        for r, s in zip(found, single, strict=False)
        if r["event"] == s["event"] == "train" and r["step"] <= 3
    ]
    assert len(pairs) == 3 and all(abs(a - b) < 0.02 * b for a, b in pairs), pairs
    assert found[-1]["loss"] < 0.8 * pairs[0][0]
    assert {r["skipped_steps"] for r in found if r["event"] == "train"} == {0}


@pytest.fixture(scope="module")
def launched(home: Path) -> Path:
    """A run that the launcher has started, in two tensor-parallel ranks."""
    pretrain.run(config(home, "launched", 2, **TP), QUIET)
    return home / "launched"


def test_launched_run_has_one_log_and_whole_checkpoints(home: Path, launched: Path) -> None:
    assert close(figures(home / "one"), figures(launched), 1e-5)
    assert complete_steps(launched) == [4, 6]
    names = [("train", step) for step in range(1, 7)] + [("eval", 3), ("eval", 6), ("test", 6)]
    assert sorted((r["event"], r["step"]) for r in figures(launched)) == sorted(names)
    loaded = load_model(launched)
    states = set(verify_lineage(loaded.artifact).values())
    assert states == {"verified"}
    for part in ("inspect", "fsck"):
        assert main(["checkpoint", part, str(launched)]) == 0


def test_complete_run_is_not_repeated_and_force_starts_over(home: Path, launched: Path) -> None:
    marker = launched / "step_00000006" / "artifact.json"
    before = marker.stat().st_mtime_ns
    artifact = pretrain.run(config(home, "launched", 2, **TP), QUIET)
    assert artifact.path == marker.parent and marker.stat().st_mtime_ns == before
    train(config(home, "forced", 2, **TP))
    assert close(train(config(home, "forced", 2, **TP), FORCE), figures(launched), 1e-6)


def test_other_stages_read_what_ranks_wrote(home: Path, launched: Path) -> None:
    from mtk.convert.open_model import open_model
    from stages import convert

    made = convert.run(convert_config(launched, home / "hf"), QUIET)
    assert json.loads((made.path / "parity.json").read_text())["passed"]
    text = home / "held.txt"
    text.write_text(write_corpus(home).read_text()[:2000])
    losses = []
    for load in ("launched", "one"):
        values = {"load": str(home / load), "task": "WIKITEXT103", "valid_data": [str(text)]}
        asked = make(EvaluateConfig, **values, output=str(home / f"evaluated-{load}"))
        losses.append(evaluate.run(asked, QUIET).metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # What `mtk serve --load` opens.
    tokens = open_model(launched).tokenizer.encode("the quick brown fox")
    assert tokens and open_model(launched).model(torch.tensor([tokens])).isfinite().all()


def test_weights_go_from_one_process_to_ranks_and_back(home: Path) -> None:
    changes = {"finetune": True, "train_iters": 2, "seed": 5}
    first = {"load": str(home / "one"), **changes}
    there = train(config(home, "there", 2, **TP, **first))
    assert close(train(config(home, "there-one", **first)), there, 1e-5)
    second = {"load": str(home / "there"), **changes}
    back = train(config(home, "back", **second))
    assert close(train(config(home, "back-pp", 2, **PP, **second)), back, 1e-5)


@pytest.mark.parametrize("name", ["dp2-optimizer", "pp2"])
def test_batch_grows_as_in_one_process(home: Path, name: str) -> None:
    length = {"train_iters": None, "train_samples": 60, "rampup_batch_size": [4, 4, 24]}
    changes = {**length, "global_batch_size": 12, "save_interval": 100}
    one = train(config(home, f"ramp-{name}-one", **changes))
    samples = [r["samples"] for r in one if r["event"] == "train"]
    assert {b - a for a, b in pairwise(samples)} == {4, 8, 12}
    assert close(one, train(config(home, f"ramp-{name}", 2, **changes, **LAYOUTS[name])), 1e-5)


def test_fewer_held_out_samples_than_ranks(home: Path) -> None:
    """One sample for two ranks: one of them scores samples that do not count."""
    changes = {"seq_length": 40, "split": "98,1,1", "train_iters": 2, "eval_interval": 1}
    one = train(config(home, "few-one", **changes))
    tokens = {r["tokens"] for r in one if r["event"] == "eval"}
    assert tokens and max(tokens) < 40 * BASE["micro_batch_size"] * 2
    assert close(one, train(config(home, "few", 2, **changes, **LAYOUTS["dp2-full"])), 1e-5)


def program(home: Path, name: str, *more: str, **changes: Any) -> list[str]:
    given = options(home, name) | changes
    flags = [f"--set={key}={json.dumps(value)}" for key, value in given.items()]
    return ["pretrain", *flags, "--nproc=2", *more]


def test_one_voice(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks, mixed precision: each line once, and none that torch thinks of."""
    sharded = ("--data-parallel-sharding=full", "--json", "--precision=bf16")
    assert main(program(home, "voice", *sharded, train_iters=3)) == 0
    out, err = capfd.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    names = [event["event"] for event in events]
    assert names == ["layout", *["train"] * 3, "eval", "test", "checkpoint", "result"]
    assert (events[0]["ranks"], events[0]["dp"]) == (2, 2)
    assert events[0]["parameters_per_rank"] < 0.6 * events[0]["parameters"]
    lines = err.splitlines()
    assert [line for line in lines if "Warning" in line] == []
    assert lines[0].startswith("2 ranks on cpu = DP 2 (fully sharded): ")
    assert sum("eval loss" in line for line in lines) == 1


@pytest.mark.parametrize("name", ["dp2-full"])
def test_stopped_launcher_saves_and_the_same_command_continues(home: Path, name: str) -> None:
    """The launcher alone is told, at an arbitrary moment."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in LAYOUTS[name].items()]
    stopped, straight = (
        program(home, f"{which}-{name}", *flags, train_iters=60, hidden_dropout=0.1)
        for which in ("stopped", "straight")
    )
    command = [sys.executable, "-m", "mtk"]
    process = subprocess.Popen([*command, *stopped], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not complete_steps(home / f"stopped-{name}") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("continues from there") == 1, err
    subprocess.run([*command, *stopped], check=True, capture_output=True)
    subprocess.run([*command, *straight], check=True, capture_output=True)
    assert figures(home / f"stopped-{name}") == figures(home / f"straight-{name}")
    both = [load_model(home / f"{which}-{name}") for which in ("stopped", "straight")]
    digests = [
        {f.path: f.sha256 for f in m.artifact.files if f.path.endswith("safetensors")} for m in both
    ]
    assert digests[0] == digests[1]
