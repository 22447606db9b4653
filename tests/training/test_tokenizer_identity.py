"""The tokenizer's fingerprint travels from text to checkpoint, and a mismatch is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtk.checkpoint import load_model
from mtk.config import make
from mtk.config.preprocess import PreprocessConfig
from mtk.config.pretrain import PretrainConfig
from mtk.config.tokenizer import TrainTokenizerConfig
from mtk.errors import CheckpointError, DataError
from mtk.log import Reporter
from mtk.session import Session
from mtk.tokenizers import load_tokenizer
from mtk.training.metrics import read_metrics
from stages import preprocess, pretrain, tokenizer

QUIET = Session(Reporter(quiet=True))
SENTENCE = "the quick brown fox jumps over a lazy dog and runs to the river bank"


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    texts = [f"{SENTENCE[i % 40 :]} {SENTENCE[: i % 40]} {i}." for i in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def dataset(folder: Path, vocab_size: int) -> str:
    """Corpus -> tokenizer of ``vocab_size`` -> dataset; returns its prefix."""
    corpus, name = str(write_corpus(folder)), f"v{vocab_size}"
    trained = make(
        TrainTokenizerConfig, input=[corpus], output=str(folder / name), vocab_size=vocab_size
    )
    tokenizer.run(trained, QUIET)
    made = make(
        PreprocessConfig,
        input=[corpus],
        output_prefix=str(folder / f"{name}-data"),
        tokenizer_model=str(folder / name),
        append_eod=True,
        workers=1,
    )
    preprocess.run(made, QUIET)
    return str(folder / f"{name}-data_text_document")


def config(folder: Path, data: list[str], **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "recipe": "gpt-tiny",
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "seq_length": 16,
        "lr": 1e-2,
        "micro_batch_size": 4,
        "train_iters": 6,
        "eval_iters": 1,
        "split": "90,5,5",
        "num_threads": 1,
        "plots": False,
        "data_path": data,
        "save": str(folder),
    }
    return make(PretrainConfig, **(values | changes))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    pretrain.run(config(folder / "run", [dataset(folder, 300)]), QUIET)
    return folder


def test_checkpoint_carries_the_datas_tokenizer(home: Path) -> None:
    loaded = load_model(home / "run")
    assert loaded.tokenizer_folder is not None
    carried = load_tokenizer(loaded.tokenizer_folder)
    assert carried.fingerprint == load_tokenizer(home / "v300").fingerprint
    assert loaded.config.vocab_size == carried.vocab_size == 300
    roles = [record.role for record in loaded.artifact.inputs]
    assert roles == ["training data"]


def test_bits_per_byte_are_those_of_the_text(home: Path) -> None:
    """Nats per token over bytes per token, counted from the decoded labels' tokens."""
    record = next(r for r in read_metrics(home / "run" / "metrics.jsonl") if r["event"] == "eval")
    assert record["bits_per_byte"] < record["loss"] / 0.6931 < 8 * record["bits_per_byte"]


def test_finetune_refuses_another_tokenizer(home: Path, tmp_path: Path) -> None:
    other = dataset(tmp_path, 320)
    ask = {"load": str(home / "run"), "finetune": True, "vocab_size": 320}
    with pytest.raises(CheckpointError, match="another tokenizer"):
        pretrain.run(config(tmp_path / "tuned", [other], **ask), QUIET)


def test_resume_refuses_another_tokenizer(home: Path, tmp_path: Path) -> None:
    other = dataset(tmp_path, 320)
    with pytest.raises(CheckpointError, match=r"tokenizer|vocab_size"):
        pretrain.run(config(home / "run", [other], train_iters=12), QUIET)


def test_blend_refuses_two_tokenizers(home: Path, tmp_path: Path) -> None:
    data = ["0.5", str(home / "v300-data_text_document"), "0.5", dataset(tmp_path, 320)]
    with pytest.raises(DataError, match="different tokenizers"):
        pretrain.run(config(tmp_path / "run", data), QUIET)
