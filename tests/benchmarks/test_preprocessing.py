"""The benchmark of preprocess: all ways read the same, and say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtk.benchmarks.preprocessing.program import COLUMNS, Row, beginning, cells
from mtk.cli.main import main
from mtk.config import make
from mtk.config.bench_preprocess import WAYS, PreprocessBenchConfig
from mtk.errors import ConfigError, DataError
from tests.preprocess.corpora import TEXTS, corpus, tokenizer_in

CHECKED = ("mtk", "mtk-workers", "mtk-reference", "engine", "loop", "megatron")


def rows(folder: Path, *ways: str) -> dict[str, dict[str, Any]]:
    corpus(folder, [text for text in TEXTS if text] * 3)
    tokenizer_in(folder)
    words = ["bench", "preprocess", "--input", str(folder / "c.jsonl"), "--workers", "2"]
    words += ["--tokenizer-model", str(folder / "tok"), "--output", str(folder / "b.json")]
    assert main([*words, "--ways", *ways]) == 0
    report = json.loads((folder / "b.json").read_text())
    assert {"commit", "cpu", "date", "libraries", "config"} <= set(report)
    return {row["way"]: row for row in report["rows"]}


@pytest.mark.slow
def test_every_way_finds_the_same_tokens(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    found = rows(tmp_path, *CHECKED)
    assert list(found) == [way for way in WAYS if way in CHECKED]  # in the order of the table
    documents = sum(bool(text) for text in TEXTS) * 3
    tokens = {way: row["found"]["tokens"] for way, row in found.items()}
    assert tokens["mtk"] == tokens["mtk-workers"] == tokens["mtk-reference"] == tokens["megatron"]
    assert tokens["engine"] == tokens["loop"] == tokens["mtk"] - documents  # no EOD
    assert found["mtk"]["found"]["detail"] == "fastokens, 1 worker(s)"
    assert found["mtk-workers"]["found"]["detail"] == "fastokens, 2 worker(s)"
    assert found["mtk-reference"]["found"]["detail"] == "reference, 1 worker(s)"
    assert found["megatron"]["times"] == 1.0
    assert found["mtk"]["cpu_seconds"] > 0
    assert found["mtk-workers"]["cpu_seconds"] is None
    assert "Megatron's algorithm" in capsys.readouterr().out


@pytest.mark.slow
def test_sentences_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = rows(tmp_path, "mtk-split", "megatron-split")
    split, other = found["mtk-split"], found["megatron-split"]
    assert split["found"]["tokens"] == other["found"]["tokens"]
    assert split["times"] > 0 and other["times"] == 1.0


def test_a_way_that_fails_has_its_reason() -> None:
    row = Row("datatrove", 3.0, None, failure="datatrove is not installed")
    assert cells(row)[-1] == "datatrove is not installed"
    assert len(cells(row)) == len(COLUMNS)
    assert row.rate is None


def test_the_beginning_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 600_000 + b"\n" + b"y" * 600_000 + b"\nz\n")
    beginning(tmp_path / "a.jsonl", 1, tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes().count(b"\n") == 2
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        beginning(tmp_path / "empty.jsonl", 1, tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ways": ("mkt",)}, "Nearest: mtk"),
        ({"megabytes": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"input": "x.txt"}, "jsonl"),
    ],
)
def test_option_rules(values: dict[str, Any], words: str) -> None:
    defaults = {"input": "x.jsonl", "tokenizer_model": "t"}
    with pytest.raises(ConfigError, match=words):
        make(PreprocessBenchConfig, **(defaults | values))
