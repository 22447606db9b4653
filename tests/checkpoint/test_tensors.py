"""Tensor files: round trip, sharding, chunks, damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtk.checkpoint.tensors import read_index, read_tensors, write_tensors
from mtk.errors import CheckpointError


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, generator=generator),
        "b.bias": torch.randn(7, generator=generator).bfloat16(),
        "step": torch.tensor(4.0),
        "ids": torch.arange(6, dtype=torch.int64),
    }


@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_round_trip_for_any_shard_size(tmp_path: Path, limit: int) -> None:
    write_tensors(tmp_path, "model", example(), limit)
    read = read_tensors(tmp_path, "model")
    assert read.keys() == example().keys()
    for name, tensor in example().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert len(list(tmp_path.glob("*.safetensors"))) == {1: 4, 60: 3, 10**9: 1}[limit]


def test_same_tensors_give_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tensors(
            tmp_path / name, "model", dict(sorted(example().items(), reverse=name == "two"))
        )
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_chunks_from_two_writers_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(4, 3)
    for part, rows in (("top", whole[:2]), ("rest", whole[2:])):
        write_tensors(tmp_path, part, {"w": rows})
    chunks = [
        {**read_index(tmp_path, part)["w"]["chunks"][0], "offset": [row, 0]}
        for part, row in (("top", 0), ("rest", 2))
    ]
    entry = {"dtype": "float32", "shape": [4, 3], "chunks": chunks}
    index = {"format": "mtk-tensors", "version": 1, "tensors": {"w": entry}}
    (tmp_path / "model.index.json").write_text(json.dumps(index))
    assert torch.equal(read_tensors(tmp_path, "model")["w"], whole)
    index["tensors"]["w"]["chunks"] = chunks[:1]  # type: ignore[index]
    (tmp_path / "model.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="6 of the 12"):
        read_tensors(tmp_path, "model")


@pytest.mark.parametrize("damage", ["missing", "cut", "index", "newer", "escape", "name"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    write_tensors(tmp_path, "model", example())
    file = next(tmp_path.glob("*.safetensors"))
    index_file = tmp_path / "model.index.json"
    index = json.loads(index_file.read_text())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "index":
        index_file.write_text(index_file.read_text()[:-20])
    elif damage == "newer":
        index_file.write_text(json.dumps({**index, "version": 2}))
    elif damage == "escape":
        index["tensors"]["step"]["chunks"][0]["file"] = "../" + file.name
        index_file.write_text(json.dumps(index))
    names = ["nothing"] if damage == "name" else None
    with pytest.raises(CheckpointError, match=r"model|nothing"):
        read_tensors(tmp_path, "model", names)
