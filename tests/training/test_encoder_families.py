"""BERT and T5 through the stages: they learn a real text, in layouts, and continue bit for bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.checkpoint import checkpoint_folder
from mtk.checkpoint.tensors import read_index, read_tensors
from mtk.config import make
from mtk.config.preprocess import PreprocessConfig
from mtk.config.pretrain import PretrainConfig
from mtk.config.tokenizer import TrainTokenizerConfig
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.metrics import read_metrics
from stages import preprocess
from stages.tokenizer import run as train_tokenizer
from tests.parallel.ranks import run_pretrain

pytestmark = pytest.mark.slow
QUIET = Session(Reporter(quiet=True))
TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "split": "1,0,0",
    "micro_batch_size": 8,
    "global_batch_size": 8,
    "clip_grad": 1.0,
    "log_interval": 1,
    "eval_iters": 0,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert"},
    "bert-post": {"family": "bert", "norm_placement": "post"},
    "t5": {"family": "t5", "decoder_seq_length": 32},
    "t5-relative": {
        "family": "t5",
        "decoder_seq_length": 32,
        "position_embedding_type": "relative",
        "normalization": "RMSNorm",
        "activation": "geglu-tanh",
        "add_bias_linear": False,
        "softmax_scale": 1.0,
        "scale_tied_output": True,
    },
}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documentation of Python's own modules, in sentences of a WordPiece vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [argparse.__doc__, json.__doc__]
    with (folder / "text.jsonl").open("w") as stream:
        for text in texts:
            stream.write(json.dumps({"text": " ".join((text or "").split())[:400]}) + "\n")
    words = make(
        TrainTokenizerConfig,
        input=[str(folder / "text.jsonl")],
        type="wordpiece",
        vocab_size=400,
        output=str(folder / "tokenizer"),
    )
    train_tokenizer(words, QUIET)
    options = make(
        PreprocessConfig,
        input=[str(folder / "text.jsonl")],
        output_prefix=str(folder / "data"),
        tokenizer_type="BertWordPieceLowerCase",
        vocab_file=str(next((folder / "tokenizer").rglob("vocab.txt"))),
        vocab_extra_ids=20,
        split_sentences=True,
        workers=1,
    )
    preprocess.run(options, QUIET)
    return folder / "data_text_sentence"


def train(folder: Path, data: Path, **changes: Any) -> list[float]:
    values = {**TINY, "data_path": [str(data)], **changes, "save": str(folder)}
    run_pretrain(make(PretrainConfig, **values))
    found = read_metrics(folder / "metrics.jsonl")
    return [record["loss"] for record in found if record["event"] == "train"]


@pytest.mark.parametrize("kind", ["bert", "t5-relative"])
def test_a_real_text_is_learnt(kind: str, sentences: Path, tmp_path: Path) -> None:
    rate = {"t5": 3e-3, "t5-relative": 1e-2}.get(kind, 1e-3)
    losses = train(tmp_path / "run", sentences, **FAMILIES[kind], train_iters=300, lr=rate)
    # Masks are drawn anew in every epoch, so that this takes much longer than for a decoder. What
    # is said here of two `mtk bench families` says of all.
    assert losses[0] > 4.5 and sum(losses[-10:]) / 10 < 0.75 * losses[0]


@pytest.mark.parametrize("kind", ["bert", "t5-relative"])
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_layouts_learn_alike(kind: str, layout: str, sentences: Path, tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pipeline": {"pipeline_model_parallel_size": 2, "micro_batch_size": 4},
        "data": {"data_parallel_sharding": "full", "micro_batch_size": 4},
    }
    common = {**FAMILIES[kind], "train_iters": 4, "lr": 1e-3}
    alone = train(tmp_path / "one", sentences, **common)
    together = train(tmp_path / "two", sentences, **{**common, "nproc": 2, **options[layout]})
    assert together == pytest.approx(alone, rel=2e-5)


@pytest.mark.parametrize("kind", ["bert", "t5-relative"])
def test_it_continues_bit_for_bit(kind: str, sentences: Path, tmp_path: Path) -> None:
    common = {**FAMILIES[kind], "hidden_dropout": 0.1, "lr": 1e-3, "lr_decay_iters": 8}
    common |= {"nproc": 2, "tensor_model_parallel_size": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = train(whole, sentences, **common, train_iters=8)
    train(parts, sentences, **common, train_iters=5)
    assert train(parts, sentences, **common, train_iters=8)[-3:] == straight[-3:]
    found = [checkpoint_folder(folder) for folder in (whole, parts)]
    for part in ("model", "optimizer"):
        names = list(read_index(found[0], part))
        first, second = (read_tensors(step, part, names) for step in found)
        assert all(torch.equal(first[name], second[name]) for name in names)
