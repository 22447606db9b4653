"""mtk lineage, checkpoint inspect, checkpoint fsck."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtk.artifacts import input_file, open_artifact, publish_directory
from mtk.checkpoint.save import CheckpointContent
from mtk.cli.main import main
from mtk.config import make
from mtk.config.flow import FlowConfig
from mtk.config.model import ModelConfig
from tests.checkpoint.publish import save_checkpoint


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Two checkpoints made from a tokenizer that was made from a file; the folder's path."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}\n")
    config = make(FlowConfig)
    with publish_directory(
        tmp_path / "tokenizer",
        kind="tokenizer",
        stage="tokenizer",
        config=config,
        inputs=[input_file(corpus, "corpus")],
    ) as out:
        (out.folder / "t.json").write_text("{}")
    model = make(
        ModelConfig,
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        seq_length=4,
        vocab_size=16,
    )
    for step in (10, 20):
        save_checkpoint(
            tmp_path / "run" / f"step_{step:08}",
            CheckpointContent(model, {"embedding.weight": torch.full((16, 8), float(step))}),
            stage="pretrain",
            config=config,
            inputs=[open_artifact(tmp_path / "tokenizer").as_input("tokenizer")],
            metrics={"loss": 1.5},
        )
    return tmp_path / "run"


def test_lineage_prints_the_chain_verified(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", str(chain)]) == 0
    out = capsys.readouterr().out
    assert "step_00000020" in out and "corpus.jsonl" in out
    assert out.count("[verified]") == 3 and "3 verified, 0 gone" in out


def test_lineage_without_verification_hashes_nothing(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chain.parent / "corpus.jsonl").write_text("[]\n")
    assert main(["lineage", "--no-verify", "--json", str(chain)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["chain"]["inputs"][0]["inputs"][0]["role"] == "corpus"
    assert result["verified"] is False


@pytest.mark.parametrize(
    ("victim", "words"),
    [
        ("corpus.jsonl", "is not what was used"),
        ("tokenizer/t.json", "changed after it was published"),
        ("run/step_00000020/model.json", "changed after it was published"),
    ],
)
def test_lineage_refuses_any_changed_byte(
    chain: Path, victim: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = chain.parent / victim
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    assert main(["lineage", str(chain)]) == 4
    assert words in capsys.readouterr().err


def test_lineage_says_what_is_gone(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chain.parent / "corpus.jsonl").unlink()
    assert main(["lineage", str(chain)]) == 0
    assert "[gone]" in capsys.readouterr().out


def test_inspect(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(chain)]) == 0
    out = capsys.readouterr().out
    assert "complete steps: 10, 20" in out
    assert "embedding.weight  [16, 8]  float32" in out
    assert "model: 1 tensors, 128 values" in out and "metric loss: 1.5" in out


def test_fsck_finds_the_flipped_bit_and_the_torn_step(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "fsck", str(chain)]) == 0
    weights = next((chain / "step_00000010").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    (chain / "step_00000030").mkdir()
    capsys.readouterr()
    assert main(["checkpoint", "fsck", "--json", str(chain)]) == 4
    captured = capsys.readouterr()
    states = json.loads(captured.out.splitlines()[0])["checkpoints"]
    assert [state == "ok" for state in states.values()] == [False, True, False]
    assert "2 of 3" in captured.err


@pytest.mark.parametrize(
    "command", [["lineage"], ["checkpoint", "inspect"], ["checkpoint", "fsck"]]
)
def test_absent_path_is_exit_4(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(tmp_path / "nothing")]) == 4
    assert "nothing" in capsys.readouterr().err
