"""Checkpoint folders: complete or not there; strict loading; keeping the last N."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mtk.checkpoint import complete_steps, latest_step, load_model, prune_steps, step_folder
from mtk.checkpoint.save import CheckpointContent
from mtk.errors import CheckpointError, MtkError
from tests.checkpoint.publish import save_checkpoint
from tests.models.sizes import llama_config, small_model


def save(folder: Path, step: int, seed: int = 1, **changes: object) -> Path:
    config = llama_config(**changes)
    model = small_model(config, seed=seed)
    content = CheckpointContent(config, dict(model.named_parameters()), training={"step": step})
    target = step_folder(folder, step)
    save_checkpoint(
        target, content, stage="pretrain", config=config, inputs=[], metrics={}, force=True
    )
    return target


def test_round_trip_gives_equal_logits(tmp_path: Path) -> None:
    save(tmp_path, 10)
    loaded = load_model(tmp_path)
    x_BS = torch.arange(20).view(2, 10)
    assert torch.equal(loaded.model(x_BS), small_model(llama_config())(x_BS))
    assert loaded.config == llama_config()
    assert loaded.artifact.kind == "checkpoint" and loaded.tokenizer_folder is None


def test_low_precision_keeps_rotary_tables_exact(tmp_path: Path) -> None:
    save(tmp_path, 10)
    model = load_model(tmp_path, dtype=torch.bfloat16).model
    assert model.rotary_cos.dtype == torch.float32
    assert torch.equal(model.rotary_cos, small_model(llama_config()).rotary_cos)
    assert model.final_norm.weight.dtype == torch.bfloat16


def test_newest_complete_step_wins_and_torn_ones_do_not_exist(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, seed=step)
    (step_folder(tmp_path, 40) / "artifact.json").unlink()
    weights = next(step_folder(tmp_path, 30).glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert complete_steps(tmp_path) == [10, 20]
    assert latest_step(tmp_path) == 20
    assert load_model(tmp_path).artifact.folder == step_folder(tmp_path, 20)


def test_keep_last(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    prune_steps(tmp_path, 0)
    assert complete_steps(tmp_path) == [10, 20, 30]
    prune_steps(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


def test_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    config = llama_config()
    broken = CheckpointContent(config, {"w": torch.zeros(2)}, training={"bad": object()})
    with pytest.raises(TypeError):
        save_checkpoint(
            tmp_path / "step_00000001",
            broken,
            stage="pretrain",
            config=config,
            inputs=[],
            metrics={},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "torn", "absent", "shape", "names", "model.json"])
def test_bad_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, 10)
    if damage == "empty":
        shutil.rmtree(folder)
    elif damage == "torn":
        (folder / "artifact.json").unlink()
    elif damage == "absent":
        tmp_path = tmp_path / "nowhere"
    else:
        edit_model(folder, damage)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    assert error.value.exit_code == 4 and isinstance(error.value, MtkError)


def edit_model(folder: Path, damage: str) -> None:
    """Rewrite the description of the model and keep the manifest's sizes consistent."""
    path = folder / "model.json"
    data = json.loads(path.read_text())
    if damage == "shape":
        data["model"]["hidden_size"] = 64
    elif damage == "names":
        data["model"]["num_layers"] = 3
    else:
        data["model"]["surprise"] = 1
    path.write_text(json.dumps(data))
    marker = folder / "artifact.json"
    manifest = json.loads(marker.read_text())
    entry = next(e for e in manifest["files"] if e["path"] == "model.json")
    entry["size"] = path.stat().st_size
    marker.write_text(json.dumps(manifest))
    from mtk.artifacts.hashing import sha256_json

    files = sorted((f["path"], f["size"], f["sha256"]) for f in manifest["files"])
    manifest["digest"] = sha256_json({"kind": "checkpoint", "files": files})
    marker.write_text(json.dumps(manifest))
