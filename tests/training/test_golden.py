"""Losses of fixed runs, pinned: a change of weights, data order, model or optimizer shows.

``python -m tests.training.test_golden`` writes the file anew after a change that is meant.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mtk.config import Layer
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.metrics import read_metrics
from stages.pretrain import run
from stages.registry import stage
from tests.training.test_pretrain import dataset

FILE = Path(__file__).with_name("golden_losses.json")
COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "split": "90,5,5",
    "train_iters": 8,
    "log_interval": 1,
    "eval_iters": 1,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}
GPT2 = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 32, "lr": 3e-3}
RUNS: dict[str, dict[str, Any]] = {
    "gpt-tiny": {"recipe": "gpt-tiny", "global_batch_size": 4, "micro_batch_size": 2},
    "gpt2-dropout": {**GPT2, "global_batch_size": 4, "micro_batch_size": 4},
    "gpt2-bf16": {**GPT2, "precision": "bf16", "hidden_dropout": 0, "attention_dropout": 0},
    "neox": {
        **GPT2,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "use_parallel_residual": True,
        "global_batch_size": 4,
    },
    "gemma-qk-norm-window": {
        "recipe": "gpt-tiny",
        "activation": "geglu-tanh",
        "apply_layernorm_1p": True,
        "scale_embeddings": True,
        "qk_layernorm": True,
        "window_size": 9,
        "global_batch_size": 4,
        "micro_batch_size": 2,
    },
    "bloom": {
        **GPT2,
        "position_embedding_type": "alibi",
        "embedding_layernorm": True,
        "global_batch_size": 4,
    },
    "megatron-order": {**GPT2, "data_order": "megatron", "train_iters": 30, "log_interval": 10},
}


def losses(name: str, folder: Path) -> list[float]:
    values = {**COMMON, "data_path": [str(dataset())], **RUNS[name], "save": str(folder)}
    config = stage("pretrain").resolve([Layer("test", values)]).config
    run(config, Session(Reporter(quiet=True)))
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_pinned_ones(name: str, tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))[name]
    # Other processors and torch versions round differently; a real change is far larger.
    tolerance = 2e-2 if "bf16" in name else 2e-4
    assert losses(name, tmp_path) == pytest.approx(golden, rel=tolerance)


if __name__ == "__main__":
    found = {name: losses(name, Path(tempfile.mkdtemp())) for name in RUNS}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
