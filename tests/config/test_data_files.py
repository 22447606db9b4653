"""Blends in files: what they hold becomes the options, and mistakes are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtk.config import make
from mtk.config.digest import config_digest
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError
from tests.training.test_pretrain import BASE


def config(**changes: Any) -> PretrainConfig:
    given = {k: v for k, v in BASE.items() if k != "split"}
    return make(PretrainConfig, **{**given, "save": "x", **changes})


def test_one_blend_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "blend.txt"
    path.write_text('0.3 data/a\n0.7   "data/b c"\n')
    found = config(data_args_path=str(path), split="8,1,1")
    wanted = config(data_path=("0.3", "data/a", "0.7", "data/b c"), split="8,1,1")
    assert found == wanted and config_digest(found) == config_digest(wanted)


def test_blends_of_each_split(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ["0.3", "a", 0.7, "b"], "valid": "c d", "test": []}))
    found = config(per_split_data_args_path=str(path)).data
    assert found.train_data_path == ("0.3", "a", "0.7", "b")
    assert found.valid_data_path == ("c", "d") and found.test_data_path == ()
    assert found.data_path == () and found.per_split_data_args_path is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data_args_path", None, "cannot be read"),
        ("data_args_path", " \n", "names no dataset"),
        ("data_args_path", '"a', "words that do not end"),
        ("data_args_path", b"\xff", "is not UTF-8"),
        ("per_split_data_args_path", "{", "is not JSON"),
        ("per_split_data_args_path", "[1]", "must hold an object"),
        ("per_split_data_args_path", '{"valid": ["a"]}', "must hold an object"),
        ("per_split_data_args_path", '{"train": ["a"], "dev": ["b"]}', "has train, dev"),
        ("per_split_data_args_path", '{"train": {"a": 1}}', '"train" must be a list'),
    ],
)
def test_mistakes(tmp_path: Path, name: str, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "file"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"data.{name} = .*{message}"):
        config(**{name: str(path)})


def test_only_one_way_to_name_data(tmp_path: Path) -> None:
    path = tmp_path / "blend.txt"
    path.write_text("a")
    with pytest.raises(ConfigError, match="give one of them"):
        config(data_args_path=str(path), data_path=("b",))
    with pytest.raises(ConfigError, match="only divides the datasets of --data-path"):
        config(per_split_data_args_path=str(path), split="8,1,1")
