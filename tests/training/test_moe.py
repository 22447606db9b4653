"""A model with experts through training, saving and what reads checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps, load_model
from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.convert.families import family_for
from mtk.errors import ConversionError
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.metrics import read_metrics
from stages.pretrain import run

QUIET = Session(Reporter(quiet=True))
MOE: dict[str, Any] = {
    "recipe": "moe-tiny",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "moe_layer_freq": 2,
    "moe_z_loss_coeff": 1e-3,
    "moe_expert_capacity_factor": 1.25,
    "hidden_dropout": 0.1,
    "seq_length": 16,
    "vocab_size": 50,
    "mock_data": True,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 6,
    "log_interval": 1,
    "save_interval": 3,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}


def train(folder: Path, **changes: Any) -> Path:
    from mtk.config.resolve import Layer
    from stages.registry import stage

    values = {**MOE, "save": str(folder), **changes}
    config: PretrainConfig = stage("pretrain").resolve([Layer("test", values)]).config
    run(config, QUIET)
    return folder


BIASED: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 24,
    "moe_shared_expert_gate": True,
}
SINKHORN: dict[str, Any] = {"moe_router_load_balancing_type": "sinkhorn"}


@pytest.mark.parametrize("changes", [{}, BIASED, SINKHORN], ids=["softmax", "biased", "sinkhorn"])
def test_balance_is_logged_and_runs_continue(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", **changes)
    records = [r for r in read_metrics(whole / "metrics.jsonl") if r["event"] == "train"]
    assert len(records) == 6
    for record in records:
        # From balance to two experts for all; and near log(8)^2 while logits are small.
        assert 1.0 - 0.1 <= record["moe_aux_loss"] <= 4.0
        assert record["moe_z_loss"] == pytest.approx(math.log(8) ** 2, rel=0.2)
        assert 0.0 <= record["moe_max_violation"] <= 3.0
        assert ("moe_bias_range" in record) == (changes is BIASED)
    if changes is BIASED:
        ranges = [record["moe_bias_range"] for record in records]
        assert ranges[:2] == pytest.approx([0.0, 0.002]) and max(ranges) > 0.002
    part = train(tmp_path / "part", **changes)
    assert complete_steps(part) == [3, 6]
    shutil.rmtree(part / "step_00000006")
    train(part, **changes)
    ours, theirs = (sorted(f.glob("step_00000006/model-*.safetensors")) for f in (whole, part))
    assert [sha256_file(f) for f in ours] == [sha256_file(f) for f in theirs] and ours


@pytest.mark.parametrize("precision", ["bf16"])
def test_low_precision(tmp_path: Path, precision: str) -> None:
    folder = train(tmp_path / "run", precision=precision, train_iters=2, save_interval=2)
    loaded = load_model(folder)
    assert loaded.config.num_experts == 8
    with torch.inference_mode():
        logits = loaded.model(torch.arange(7)[None])
    assert logits.shape == (1, 7, 50) and torch.isfinite(logits).all()


def test_no_foreign_family_takes_it_for_dense() -> None:
    model = {k: v for k, v in MOE.items() if k in ModelConfig.__dataclass_fields__}
    with pytest.raises(ConversionError, match="num_experts = 8: Llama is dense"):
        family_for(make(ModelConfig, **model, num_experts=8, add_bias_linear=False), "llama")
