"""BERT's and T5's data in a run: from text to batches, held-out filling, resuming, identity."""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps
from mtk.config import make
from mtk.config.preprocess import PreprocessConfig
from mtk.config.pretrain import PretrainConfig
from mtk.data.indexed_dataset import IndexedDatasetWriter
from mtk.data.loader import MicroBatch
from mtk.errors import ConfigError, DataError
from mtk.log import Reporter
from mtk.training.data import data_identity, run_data, with_vocabulary
from mtk.training.loop import RunData
from mtk.training.metrics import read_metrics
from mtk.training.opened_data import open_data
from stages import preprocess
from stages.pretrain import run
from tests.training.test_pretrain import BASE, QUIET

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("cat", "dog", "house", "tree", "walk", "sing", "river", "over", "under", "blue")
PAD, CLS, SEP, MASK = 0, 2, 3, 4


@cache
def dataset(level: str = "sentence", **tokenizer: Any) -> Path:
    """300 documents of up to eight sentences, preprocessed with WordPiece."""
    folder = Path(tempfile.mkdtemp())
    pieces = [*SPECIALS, *WORDS, "##ing", "##ed", "."]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    rng = random.Random(0)

    def sentence() -> str:
        words = [rng.choice(WORDS) + rng.choice(("", "ing")) for _ in range(rng.randint(3, 9))]
        return " ".join(words).capitalize() + "."

    with (folder / "corpus.jsonl").open("w") as stream:
        for _ in range(300):
            text = " ".join(sentence() for _ in range(rng.randint(1, 8)))
            stream.write(json.dumps({"text": text}) + "\n")
    options = make(
        PreprocessConfig,
        input=[str(folder / "corpus.jsonl")],
        output_prefix=str(folder / "data"),
        split_sentences=level == "sentence",
        tokenizer_type="BertWordPieceLowerCase",
        vocab_file=str(folder / "vocab.txt"),
        vocab_extra_ids=tokenizer.pop("extra_ids", 20),
        workers=1,
    )
    preprocess.run(options, QUIET)
    return folder / f"data_text_{level}"


def config(folder: Path, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        **BASE,
        "family": "bert",
        "seq_length": 48,
        "vocab_size": None,
        "data_path": [str(dataset())],
        "decoder_seq_length": 24 if changes.get("family") == "t5" else None,
        **changes,
        "save": str(folder),
    }
    return make(PretrainConfig, **{name: v for name, v in values.items() if v is not None})


def opened(options: PretrainConfig, *, rank: int = 0, size: int = 1) -> RunData:
    data = open_data(options.data)
    options = with_vocabulary(options, data)
    return run_data(options, data, 400, Reporter(quiet=True), rank, size)


def micro(found: RunData, consumed: int = 0) -> MicroBatch:
    batch = next(found.train(consumed)).micro_batches[0]
    assert isinstance(batch, MicroBatch)
    return batch


def test_batches_of_bert(tmp_path: Path) -> None:
    found = micro(opened(config(tmp_path, micro_batch_size=4)))
    assert set(found.extra) == {"types", "order"}
    assert found.extra["types"].shape == found.tokens_BS.shape == (4, 48)
    assert found.extra["order"].shape == (4,)
    assert found.documents_BS is not None and found.positions_BS is None
    assert (found.tokens_BS[:, 0] == CLS).all()
    assert (found.tokens_BS[found.documents_BS == 1] == PAD).all()
    assert (found.tokens_BS == MASK).any()
    text = torch.where(found.loss_mask_BS == 1, found.labels_BS, found.tokens_BS)
    assert (text == SEP).sum(1).tolist() == [2] * 4
    single = micro(opened(config(tmp_path, bert_binary_head=False)))
    assert set(single.extra) == {"types"}


def test_batches_of_t5(tmp_path: Path) -> None:
    found = micro(opened(config(tmp_path, family="t5", micro_batch_size=4)))
    assert set(found.extra) == {"decoder_tokens"}
    assert found.extra["decoder_tokens"].shape == found.labels_BS.shape
    assert found.loss_mask_BS.shape == found.labels_BS.shape
    assert found.documents_BS is not None and found.documents_BS.shape == found.tokens_BS.shape
    count = found.loss_mask_BS[0].sum().int()
    assert found.extra["decoder_tokens"][0, 1:count].equal(found.labels_BS[0, : count - 1])


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_mock_data(tmp_path: Path, family: str) -> None:
    options = config(
        tmp_path, family=family, data_path=[], split="969,30,1", mock_data=True, vocab_size=99
    )
    assert micro(opened(options)).tokens_BS.max() < 99


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_ranks_share_the_same_samples(tmp_path: Path, family: str) -> None:
    options = config(tmp_path, family=family)
    whole = next(opened(options).train(8)).micro_batches
    halves = [next(opened(options, rank=r, size=2).train(8)).micro_batches[0] for r in (0, 1)]
    for one, other in zip(whole, halves, strict=True):
        assert torch.equal(one.tokens_BS, other.tokens_BS)
        for name in one.extra:
            assert torch.equal(one.extra[name], other.extra[name])


@pytest.mark.parametrize("consumed", [0, 20, 396])
def test_the_order_goes_on_from_any_sample(tmp_path: Path, consumed: int) -> None:
    found = opened(config(tmp_path))
    straight = [m for batch in found.train(0) for m in batch.micro_batches]
    rest = [m for batch in found.train(consumed) for m in batch.micro_batches]
    assert len(rest) == (400 - consumed) // 2
    for one, other in zip(straight[consumed // 2 :], rest, strict=True):
        assert torch.equal(one.tokens_BS, other.tokens_BS)
        assert torch.equal(one.loss_mask_BS, other.loss_mask_BS)


def counted(options: PretrainConfig, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Which held-out samples of a rank count for tokens, and which for the order of segments."""
    found = opened(options, rank=rank, size=size)
    assert found.valid is not None
    batches = [m for batch in found.valid() for m in batch.micro_batches]
    tokens = torch.cat([m.loss_mask_BS.sum(1) > 0 for m in batches])
    return tokens, torch.cat([m.extra["order"] >= 0 for m in batches])


def test_filling_samples_count_for_nothing(tmp_path: Path) -> None:
    split = {"split": "287,13,0", "eval_iters": 50}
    alone = config(tmp_path, **split, micro_batch_size=1, global_batch_size=1)
    samples = len(counted(alone, 0, 1)[1])
    options = config(tmp_path, **split, micro_batch_size=4, global_batch_size=12)
    of_ranks = [counted(options, rank, 3) for rank in range(3)]
    tokens, order = (torch.cat(parts) for parts in zip(*of_ranks, strict=True))
    assert len(order) == 24 > samples > 8
    assert int(order.sum()) == samples
    assert not tokens[~order].any()


def test_the_identity_of_the_data(tmp_path: Path) -> None:
    data = open_data(config(tmp_path).data)
    changes: list[dict[str, Any]] = [
        *({}, {"mask_prob": 0.2}, {"short_seq_prob": 0.0}, {"bert_binary_head": False}),
        *({"family": "t5"}, {"family": "gpt"}, {"seq_length": 32}),
    ]
    assert len({data_identity(config(tmp_path, **c), data, 40) for c in changes}) == len(changes)
    longer = config(tmp_path, train_iters=90)
    assert data_identity(longer, data, 400) == data_identity(config(tmp_path), data, 40)


def newest(folder: Path) -> dict[str, str]:
    step = folder / f"step_{complete_steps(folder)[-1]:08}"
    return {path.name: sha256_file(path) for path in sorted(step.glob("*.safetensors"))}


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_learns_and_continues_bit_for_bit(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {
        **{"family": family, "train_iters": 40, "lr_decay_iters": 40, "save_interval": 25},
    }
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(config(straight, **changes), QUIET)
    run(config(stopped, **{**changes, "train_iters": 25}), QUIET)
    run(config(stopped, **changes), QUIET)
    assert newest(straight) == newest(stopped)
    losses = [r["loss"] for r in read_metrics(straight / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0]


def test_a_document_level_dataset_is_refused(tmp_path: Path) -> None:
    options = config(tmp_path, data_path=[str(dataset("document"))])
    with pytest.raises(DataError, match=r"every document is one sequence.*--split-sentences"):
        run(options, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "foreign_text_sentence"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(9), [4, 5])
    options = config(tmp_path / "run", data_path=[str(prefix)], vocab_size=50)
    with pytest.raises(ConfigError, match=r"the tokenizer of .*foreign_text_sentence"):
        run(options, QUIET)


def test_a_tokenizer_without_sentinels_is_refused(tmp_path: Path) -> None:
    prefix = str(dataset(extra_ids=0))
    opened(config(tmp_path, data_path=[prefix]))
    message = "needs sentinels in the vocabulary, which the data's BertWordPieceLowerCase has not"
    with pytest.raises(ConfigError, match=message):
        opened(config(tmp_path, family="t5", data_path=[prefix]))
