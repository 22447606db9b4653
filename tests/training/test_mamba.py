"""Mamba and hybrid models through the stage: they learn a real text, and continue bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps, load_model
from mtk.config.resolve import Layer
from mtk.data.indexed_dataset import IndexedDatasetWriter
from mtk.errors import CheckpointError
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.metrics import read_metrics
from stages.pretrain import run
from stages.registry import stage

QUIET = Session(Reporter(quiet=True))
TINY: dict[str, Any] = {
    "hidden_size": 48,
    "mamba_head_dim": 12,
    "mamba_state_dim": 16,
    "mamba_chunk_size": 16,
    "seq_length": 64,
    "vocab_size": 256,
    "split": "1,0,0",
    "micro_batch_size": 4,
    "global_batch_size": 4,
    "log_interval": 1,
    "eval_iters": 0,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {"recipe": "mamba-tiny", "hybrid_layer_pattern": "MM"},
    "hybrid": {"recipe": "hybrid-tiny", "hybrid_layer_pattern": "M-*M"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of a real text: 1500 characters of Python's own documentation of json."""
    prefix = tmp_path_factory.mktemp("data") / "text_document"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        tokens = np.frombuffer((json.__doc__ or "").encode()[:1500], dtype=np.uint8)
        writer.add_document(tokens.astype(np.int64), [len(tokens)])
    return prefix


def train(folder: Path, data: Path, **changes: Any) -> Path:
    values = {**TINY, "data_path": [str(data)], **changes, "save": str(folder)}
    run(stage("pretrain").resolve([Layer("test", values)]).config, QUIET)
    return folder


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["event"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_text_is_learnt_by_heart(kind: str, text: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", text, **KINDS[kind], train_iters=150, lr=1e-2, min_lr=1e-3)
    found = losses(folder)
    assert found[0] > 4.5 and found[-1] < 0.2
    # And it knows what comes next.
    model = load_model(folder).model.eval()
    tokens = torch.tensor(list((json.__doc__ or "").encode()[:64]))[None]
    with torch.inference_mode():
        predicted = model(tokens)[0, 20:-1].argmax(-1)
    assert (predicted == tokens[0, 21:]).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_runs_continue_bit_for_bit(kind: str, text: Path, tmp_path: Path) -> None:
    changes = {**KINDS[kind], "train_iters": 4, "save_interval": 2, "hidden_dropout": 0.1}
    whole = train(tmp_path / "whole", text, **changes)
    part = train(tmp_path / "part", text, **changes)
    assert complete_steps(part) == [2, 4]
    shutil.rmtree(part / "step_00000004")
    train(part, text, **changes)
    for kept in ("model", "optimizer"):
        ours, theirs = (sorted(f.glob(f"step_00000004/{kept}-*")) for f in (whole, part))
        assert [sha256_file(f) for f in ours] == [sha256_file(f) for f in theirs] and ours


def test_low_precision_and_what_a_checkpoint_is_of(text: Path, tmp_path: Path) -> None:
    changes = {**KINDS["hybrid"], "train_iters": 2, "save_interval": 2}
    folder = train(tmp_path / "run", text, **changes, precision="bf16")
    assert all(np.isfinite(losses(folder)))
    assert load_model(folder).config.hybrid_layer_pattern == "M-*M"
    # B and C of other groups have the same shapes.
    other = {**changes, "mamba_num_groups": 4, "mamba_state_dim": 8}
    with pytest.raises(CheckpointError, match="mamba_num_groups was 2, now 4"):
        train(tmp_path / "other", text, **other, load=str(folder), finetune=True)
