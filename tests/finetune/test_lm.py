"""Continued training: weights only, from native checkpoints and Hugging Face directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.artifacts import open_artifact
from mtk.artifacts.hashing import sha256_file
from mtk.checkpoint import complete_steps, load_model, read_tensors
from mtk.config import make
from mtk.config.convert import ConvertConfig
from mtk.config.finetune import FinetuneConfig
from mtk.errors import ArtifactError, CheckpointError, ConfigError
from mtk.training.data import run_data, with_vocabulary
from mtk.training.metrics import read_metrics
from mtk.training.opened_data import open_data
from mtk.training.state import read_training
from stages import convert, pretrain
from stages.finetune import run
from tests.training.test_pretrain import BASE, QUIET, dataset
from tests.training.test_pretrain import config as pretrain_config

OPTIONS: dict[str, Any] = {
    "task": "lm",
    "split": "90,5,5",
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 6,
    "lr": 1e-3,
    "log_interval": 2,
    "save_interval": 3,
    "device": "cpu",
    "num_threads": 1,
    "plots": False,
}


def config(base: Path, save: Path, **changes: Any) -> FinetuneConfig:
    values = {**OPTIONS, "data_path": [str(dataset())], **changes}
    return make(FinetuneConfig, pretrained_checkpoint=str(base), save=str(save), **values)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pretrain.run(pretrain_config(folder, train_iters=8), QUIET)
    return folder


def test_step_zero_is_the_base_and_training_starts_anew(base: Path, tmp_path: Path) -> None:
    artifact = run(config(base, tmp_path, train_iters=1, lr=1e-30, min_lr=0.0), QUIET)
    before, after = (
        read_tensors(base / "step_00000008", "model"),
        read_tensors(artifact.folder, "model"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    progress = read_training(artifact.folder)["progress"]
    assert progress["step"] == 1 and progress["consumed_samples"] == 4
    roles = {record.role: record for record in artifact.inputs}
    assert roles["initial model"].digest == open_artifact(base / "step_00000008").digest
    assert artifact.stage == "finetune"


def test_what_fills_the_last_step_of_the_last_epoch_counts_nothing(tmp_path: Path) -> None:
    """Nine samples, in steps of two ranks with two each."""
    core = pretrain_config(tmp_path, global_batch_size=4, micro_batch_size=2)
    data = open_data(core.data)
    for rank in range(2):
        found = run_data(with_vocabulary(core, data), data, 12, QUIET.reporter, rank, 2, counted=9)
        masks = [m.loss_mask_BS.sum(1) > 0 for b in found.train(4) for m in b.micro_batches]
        assert [m.tolist() for m in masks] == [[True] * 2, [rank == 0, False]]


def test_epochs_are_counted_evaluated_and_saved(base: Path, tmp_path: Path) -> None:
    changes = {"train_iters": None, "epochs": 2, "save_interval": 10_000, "keep_checkpoints": 0}
    run(config(base, tmp_path, **changes), QUIET)
    records = read_metrics(tmp_path / "metrics.jsonl")
    evaluated = [record["step"] for record in records if record["event"] == "eval"]
    assert len(evaluated) == 2 and complete_steps(tmp_path) == evaluated
    assert abs(evaluated[1] - 2 * evaluated[0]) <= 1


def weights(folder: Path) -> dict[str, str]:
    newest = folder / f"step_{complete_steps(folder)[-1]:08}"
    return {p.name: sha256_file(p) for p in sorted(newest.glob("*.safetensors"))}


def test_the_same_command_continues_bit_for_bit(base: Path, tmp_path: Path) -> None:
    dropout = {"hidden_dropout": 0.1, "keep_checkpoints": 0}
    run(config(base, tmp_path / "straight", **dropout), QUIET)
    run(config(base, tmp_path / "stopped", **dropout), QUIET)
    shutil.rmtree(tmp_path / "stopped" / "step_00000006")
    run(config(base, tmp_path / "stopped", **dropout), QUIET)
    assert weights(tmp_path / "straight") == weights(tmp_path / "stopped")
    again = run(config(base, tmp_path / "stopped", **dropout), QUIET)
    assert again.folder.name == "step_00000006"


def test_begins_from_a_hugging_face_directory(base: Path, tmp_path: Path) -> None:
    converted = make(ConvertConfig, load=str(base), save=str(tmp_path / "hf"), to="hf")
    convert.run(converted, QUIET)
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    native = run(config(base, tmp_path / "native", **dropout), QUIET)
    foreign = run(config(tmp_path / "hf", tmp_path / "foreign", **dropout), QUIET)
    one, other = load_model(native.folder), load_model(foreign.folder)
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(one.model(tokens), other.model(tokens))


def test_another_base_is_no_continuation(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pretrain.run(pretrain_config(other, train_iters=4, seed=5), QUIET)
    run(config(base, tmp_path / "run"), QUIET)
    with pytest.raises(CheckpointError, match=r"base was .*Use another --save"):
        run(config(other, tmp_path / "run", train_iters=9), QUIET)
    with pytest.raises(CheckpointError, match="another model"):
        run(config(other, tmp_path / "run"), QUIET)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, r"num_layers = 3: .* has 2"),
        ({"num_layers": 3, "hidden_size": 64}, r"(?s)has 2.*hidden_size = 64: .* has 32"),
        ({"seq_length": 99}, "exceeds max_position_embeddings = 16"),
        ({"tensor_model_parallel_size": 2}, "TP x PP x CP"),
        ({"train_data": ["x.jsonl"]}, "token datasets"),
        ({"data_path": []}, "no data given"),
        ({"epochs": 1}, "exactly one of"),
        ({"train_iters": None}, "exactly one of"),
    ],
)
def test_wrong_options(base: Path, tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(config(base, tmp_path / "save", **changes), QUIET)
    assert not (tmp_path / "save").exists()


def test_nothing_to_begin_from(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        run(config(tmp_path / "no", tmp_path / "save"), QUIET)


def test_pretrain_and_finetune_do_not_share_a_folder(base: Path, tmp_path: Path) -> None:
    run(config(base, tmp_path), QUIET)
    with pytest.raises(CheckpointError, match="written by mtk finetune"):
        pretrain.run(
            make(
                type(pretrain_config(tmp_path)),
                **{**BASE, "data_path": [str(dataset())], "save": str(tmp_path)},
            ),
            QUIET,
        )
