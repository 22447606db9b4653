"""Finetuning on CUDA: conversations, adapters and heads give the CPU's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.convert.models import llama, save_native
from tests.finetune.runs import assert_close, options, train, write_lines
from tests.finetune.tasks import mnli, save_bert
from tests.finetune.test_sft import talks

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    save_native(folder / "base", llama(seq_length=48, max_position_embeddings=64, num_layers=2))
    write_lines(folder / "talk.jsonl", talks(30))
    save_bert(folder / "bert")
    mnli(folder / "MNLI" / "train.tsv", 40, 1)
    return folder


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4, "lora_targets": "all"}], ids=["all", "lora"])
def test_conversations_equal_the_cpu(home: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    own = {"train_data": [str(home / "talk.jsonl")], "chat_template": "plain", "lr": 1e-4, **lora}
    runs = [
        train(options("sft", home / "base", tmp_path / device, **own, device=device, compile=False))
        for device in ("cpu", "cuda")
    ]
    assert_close(runs[1], runs[0], 1e-3)


def test_adapters_train_in_bf16(home: Path, tmp_path: Path) -> None:
    own = {"train_data": [str(home / "talk.jsonl")], "chat_template": "plain", "lora_rank": 4}
    wanted = options(
        "sft",
        home / "base",
        tmp_path,
        **own,
        precision="bf16",
        device="cuda",
        compile=False,
        train_iters=20,
        lr=1e-2,
    )
    losses = [record["loss"] for record in train(wanted)]
    assert losses[-1] < losses[0]


def test_a_head_equals_the_cpu(home: Path, tmp_path: Path) -> None:
    data = [str(home / "MNLI" / "train.tsv")]
    own = {"train_data": data, "valid_data": data, "lr": 1e-4}
    runs = [
        train(
            options("MNLI", home / "bert", tmp_path / device, **own, device=device, compile=False)
        )
        for device in ("cpu", "cuda")
    ]
    assert_close(runs[1], runs[0], 1e-3)
