"""Training on CUDA: equal to the CPU in fp32, close in bf16 and fp16, exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.metrics import read_metrics
from stages.pretrain import run

BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 256,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "vocab_size": 1000,
    "mock_data": True,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "train_iters": 20,
    "lr": 1e-3,
    "log_interval": 1,
    "eval_iters": 1,
    "save_interval": 10,
    "plots": False,
    "compile": False,
}
QUIET = Session(Reporter(quiet=True))


def losses(folder: Path, **changes: Any) -> list[float]:
    run(make(PretrainConfig, **{**BASE, **changes, "save": str(folder)}), QUIET)
    records = read_metrics(folder / "metrics.jsonl")
    return [r["loss"] for r in records if r["event"] == "train"]


def final_weights(folder: Path) -> str:
    return sha256_file(next((folder / "step_00000020").glob("model-*.safetensors")))


def test_fp32_equals_the_cpu(tmp_path: Path) -> None:
    gpu = losses(tmp_path / "gpu", device="cuda")
    cpu = losses(tmp_path / "cpu", device="cpu")
    assert gpu[-1] < gpu[0] - 0.5
    assert gpu == pytest.approx(cpu, rel=2e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(tmp_path: Path, precision: str) -> None:
    exact = losses(tmp_path / "fp32", device="cuda")
    scale = {"initial_loss_scale": 2.0**14} if precision == "fp16" else {}
    low = losses(tmp_path / precision, precision=precision, **scale)
    assert low == pytest.approx(exact, rel=2e-2)


# The compiler warns about its own imports and look-ups; nothing of it is ours.
COMPILER = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize(
    "changes",
    [{"attention_backend": "flash"}, pytest.param({"compile": True}, marks=COMPILER)],
    ids=str,
)
def test_kernels_agree(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = losses(tmp_path / "plain", precision="bf16")
    fast = losses(tmp_path / "fast", precision="bf16", **changes)
    assert fast == pytest.approx(plain, rel=1e-2)


def test_resume_is_exact_with_dropout_and_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changes = {"precision": "bf16", "hidden_dropout": 0.1, "deterministic_mode": True}
    try:
        losses(tmp_path / "straight", **changes)
        losses(tmp_path / "resumed", **changes)
        end = tmp_path / "resumed" / "step_00000020"
        expected = final_weights(tmp_path / "straight")
        assert final_weights(tmp_path / "resumed") == expected
        (end / "artifact.json").unlink()  # as if killed before the last checkpoint
        losses(tmp_path / "resumed", **changes)
        assert final_weights(tmp_path / "resumed") == expected
    finally:
        torch.use_deterministic_algorithms(False)
