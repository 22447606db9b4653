"""Runs on several ranks through the stage: continued bit for bit, in their own layout or, but
for rounding, in another; killed; and fp16 on ranks that see different overflows."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps
from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.log import Reporter
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import make_ranks
from mtk.session import Session
from mtk.training.assemble import make_stepper
from mtk.training.metrics import read_metrics
from mtk.verification.observe import random_sample, share
from tests.launch.test_launch import members_of, wait_for
from tests.parallel.layouts import configure
from tests.parallel.ranks import run_pretrain, run_ranks

slow = pytest.mark.slow
QUIET = Session(Reporter(quiet=True))
TP, PP, CP = (f"{a}_parallel_size" for a in ("tensor_model", "pipeline_model", "context"))
SCHEDULE, SHARDING = "pipeline_schedule", "data_parallel_sharding"
BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 16,
    "vocab_size": 50,
    "mock_data": True,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "train_iters": 6,
    "lr": 1e-2,
    "lr_warmup_iters": 2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "log_interval": 1,
    "eval_interval": 4,
    "eval_iters": 1,
    "save_interval": 3,
    "keep_checkpoints": 0,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
    "nproc": 2,
}
MOE = {"num_experts": 4, "activation": "swiglu", "add_bias_linear": False}
BIASED = {
    **MOE,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
    "moe_shared_expert_intermediate_size": 16,
    "moe_layer_freq": "[0]+[1]*3",
}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {TP: 2},
    "tp2.sp": {TP: 2, "sequence_parallel": True},
    "pp2.1f1b": {PP: 2},
    "pp2.zbv": {PP: 2, SCHEDULE: "zbv"},
    "cp2": {CP: 2, "attention_dropout": 0.0},
    "dp2.optimizer": {SHARDING: "optimizer"},
    "dp2.full": {SHARDING: "full"},
    "dp2.optimizer.bf16": {SHARDING: "optimizer", "precision": "bf16"},
    "ep2": {"expert_model_parallel_size": 2, **MOE},
    "ep2.biased.bf16": {"expert_model_parallel_size": 2, **BIASED, "precision": "bf16"},
}


def config(folder: Path, **changes: Any) -> PretrainConfig:
    return make(PretrainConfig, **{**BASE, **changes, "save": str(folder)})


def files(folder: Path, step: int) -> dict[str, str]:
    """SHA-256 of weights, optimizer state and random states."""
    found = sorted((folder / f"step_{step:08}").glob("*.safetensors"))
    assert {p.name.split("-")[0] for p in found} == {"model", "optimizer", "random"}
    return {path.name: sha256_file(path) for path in found}


def losses(folder: Path) -> dict[int, float]:
    records = read_metrics(folder / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if r["event"] == "train"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tp2.sp" else slow) for name in LAYOUTS]
)
def test_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    """All that a run goes on from is on disk: what step 3 left there leads to the same step 6."""
    run_pretrain(config(tmp_path, **LAYOUTS[name]))
    assert complete_steps(tmp_path) == [3, 6]
    straight, curve = files(tmp_path, 6), losses(tmp_path)
    shutil.rmtree(tmp_path / "step_00000006")
    run_pretrain(config(tmp_path, **LAYOUTS[name]))
    assert files(tmp_path, 6) == straight
    assert losses(tmp_path) == curve


@slow
def test_continues_in_another_layout(tmp_path: Path) -> None:
    """Losses go on as in the run that was not interrupted."""
    run_pretrain(config(tmp_path / "run", **LAYOUTS["tp2"] | NO_DROPOUT))
    straight = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    assert sorted(straight) == [1, 2, 3, 4, 5, 6]
    for name in ("pp2.zbv", "cp2", "dp2.full", "one"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        layout = LAYOUTS.get(name, {"nproc": 1})
        run_pretrain(config(tmp_path / name, **layout | NO_DROPOUT))
        assert losses(tmp_path / name) == pytest.approx(straight, rel=1e-5)


@slow
def test_continues_without_sequence_parallelism(tmp_path: Path) -> None:
    """Ranks that drew dropout for rows of their own now hold copies, and must draw alike."""
    run_pretrain(config(tmp_path, **LAYOUTS["tp2.sp"]))
    shutil.rmtree(tmp_path / "step_00000006")
    run_pretrain(config(tmp_path, **LAYOUTS["tp2"], replica_check_interval=1))
    assert complete_steps(tmp_path) == [3, 6]


@slow
@pytest.mark.parametrize("victim", ["rank", "launcher"])
def test_killed_and_started_again(tmp_path: Path, victim: str) -> None:
    """kill -9 at an arbitrary moment; the same command then ends with the same bytes."""
    changes = {"train_iters": 60, "save_interval": 10, "eval_interval": 100, SHARDING: "optimizer"}
    run_pretrain(config(tmp_path / "straight", **changes))
    arguments = [repr(BASE | changes | {"save": str(tmp_path / "run")})]
    program = "import sys, ast; from stages.pretrain import run; from mtk.config import make; "
    program += "from mtk.config.pretrain import PretrainConfig; "
    program += "run(make(PretrainConfig, **ast.literal_eval(sys.argv[1])))"
    started = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE)
    first = tmp_path / "run" / "step_00000010" / "artifact.json"
    wait_for(first.exists)
    os.kill(started.pid if victim == "launcher" else ranks_of(started.pid)[-1], signal.SIGKILL)
    started.communicate(timeout=60)
    assert started.returncode != 0
    done = complete_steps(tmp_path / "run")
    assert 10 in done and 60 not in done
    time.sleep(2.0 if victim == "launcher" else 0.0)  # ranks that lost their launcher end
    run_pretrain(config(tmp_path / "run", **changes))
    assert files(tmp_path / "run", 60) == files(tmp_path / "straight", 60)


def ranks_of(launcher: int) -> list[int]:
    """The processes in the session of the server that a launcher started, but for the server."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == launcher and int(fields[3]) == int(entry.name):
            return sorted(pid for pid in members_of(int(entry.name)) if pid != int(entry.name))
    raise AssertionError("the launcher has started nothing")


# -- fp16 ------------------------------------------------------------------------------------

FP16 = {"precision.precision": "fp16", "precision.initial_loss_scale": 1024.0}
FP16 |= {"precision.hysteresis": 1}


def _overflowing(rank: int, config: PretrainConfig) -> list[tuple[bool, dict[str, Any], bool]]:
    """Three steps; in the second one an infinite gradient on rank 1. Of each: whether it was
    applied, the loss scale after it, whether the weights here changed."""
    ranks = make_ranks(Dims.of(config.parallel, 2), rank=rank, device=torch.device("cpu"))
    stepper = make_stepper(config, 80, ranks)
    batch = share(random_sample(config), 1, ranks.dp.rank, ranks.dp.size)
    train, found = stepper.passes.train, []
    for step in range(3):
        before = {name: w.detach().clone() for name, w in stepper.main.weights.items()}

        def overflow(*given: Any, step: int = step) -> torch.Tensor:
            loss = train(*given)
            if (rank, step) == (1, 1):
                gradient = next(g for n, g in stepper.main.gradients.items() if "mlp.up" in n)
                assert gradient is not None
                gradient.view(-1)[0] = torch.inf
            return loss

        stepper.passes.train = overflow  # type: ignore[method-assign]
        result = stepper.step(batch, 8 * step)
        after = stepper.main.weights
        changed = any(not torch.equal(after[name], before[name]) for name in before)
        found.append((result.applied, stepper.loss_scale.to_dict(), changed))
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {SHARDING: "optimizer"},
        pytest.param({TP: 2}, marks=slow),
        pytest.param({PP: 2, SCHEDULE: "zbv"}, marks=slow),
        pytest.param({PP: 2}, marks=slow),
    ],
    ids=str,
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout: dict[str, Any]) -> None:
    found = run_ranks(2, _overflowing, configure("gpt2", 2, FP16, **layout))
    assert found[0] == found[1]
    assert [(applied, changed) for applied, _, changed in found[0]] == [
        (True, True),
        (False, False),
        (True, True),
    ]
    assert [scale["scale"] for _, scale, _ in found[0]] == [1024.0, 512.0, 512.0]
