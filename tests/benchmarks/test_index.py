"""``mtk bench index``: what it measures, and that it builds what training would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtk.benchmarks.index import bench_index
from mtk.cli.main import main
from mtk.config import make
from mtk.config.bench_index import IndexBenchConfig
from mtk.errors import ConfigError
from mtk.log import Reporter

SIZES = {"samples": 300_000, "documents": 1000, "seq_length": 8}


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    output = str(tmp_path / "index.json")
    config = make(
        IndexBenchConfig, **SIZES, epochs=3, output=output, cache_folder=str(tmp_path / "c")
    )
    row = bench_index(config, Reporter(quiet=True))
    assert row.samples >= 300_000 and row.documents == 1000 and row.epochs >= 3
    assert row.compiled and row.seconds > 0
    # Three indices: documents of all epochs, two int32 a sample (and one more), one uint32.
    assert row.arrays == 4 * row.epochs * 1000 + 8 * (row.samples + 1) + 4 * row.samples
    assert row.open_seconds is not None and row.store_seconds is not None
    assert row.base > 0 and row.beyond < 1 << 30
    assert json.loads(Path(output).read_text())["index"]["samples"] == row.samples


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main(["bench", "index", *words, "--no-compiled", "--data-order", "megatron"]) == 0
    text = capsys.readouterr().out
    assert "numpy" in text and "megatron" in text


def test_documents_that_are_too_long() -> None:
    with pytest.raises(ConfigError, match=r"more than 2\^31 tokens"):
        make(IndexBenchConfig, samples=10**9, documents=100)
