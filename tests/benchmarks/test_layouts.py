"""The benchmark of layouts: what is run, and what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtk.benchmarks.layouts import BASELINE, bench_layouts, cells, configured, reason
from mtk.benchmarks.record import known_gpu
from mtk.config import make
from mtk.config.bench import LayoutsBenchConfig
from mtk.config.plan import GPUS
from mtk.errors import ConfigError, WorkerError
from mtk.log import Reporter

TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 61,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "lr": 1e-3,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "device": "cpu",
    "num_threads": 1,
    "warmup": 1,
    "steps": 2,
}


def config(*layouts: str, **changes: Any) -> LayoutsBenchConfig:
    return make(LayoutsBenchConfig, **TINY, layout=layouts, **changes)


def test_rows_of_real_trainings(tmp_path: Path) -> None:
    output = tmp_path / "layouts.json"
    rows = bench_layouts(config("dp2.optimizer", output=str(output)), Reporter(quiet=True))
    assert [row.layout for row in rows] == [BASELINE, "dp2.optimizer"]
    alone, two = rows
    assert two.loss == pytest.approx(alone.loss, rel=1e-5)
    assert alone.speedup == 1.0 and two.speedup and two.tokens_per_second
    assert two.speedup == pytest.approx(two.tokens_per_second / (alone.tokens_per_second or 0))
    assert [len(rank.seconds) for rank in two.runs[0]] == [2, 2]
    # Each rank of the distributed optimizer steps half of the weights.
    assert sum(rank.parameters for rank in two.runs[0]) == alone.runs[0][0].parameters
    written = json.loads(output.read_text())
    assert written["tokens_per_step"] == 8 * 16
    assert [row["layout"] for row in written["layouts"]] == [row.layout for row in rows]
    assert len({row["config_digest"] for row in written["layouts"]}) == 2
    assert all(len(cells(row)) == 9 for row in rows)


def test_options_belong_to_one_layout() -> None:
    given = config("pp2.1f1b[micro_batch_size=2, compile=true]", "pp2.interleaved.c1")
    found = dict(configured(given))
    pipeline = found["pp2.1f1b[micro_batch_size=2, compile=true]"]
    assert pipeline.batch.micro_batch_size == 2 and pipeline.runtime.compile
    assert pipeline.parallel.nproc == 2
    other = found["pp2.interleaved.c1"]
    assert other.batch.micro_batch_size == 1 and not other.runtime.compile
    assert {layout.batch.full for layout in found.values()} == {8}


def test_all_illegal_layouts_are_told_at_once() -> None:
    given = config("tp3", "dp16.full", "pp2.2f2b", "tp2[micro_batch=2]", "tp2[")
    with pytest.raises(ConfigError) as caught:
        list(configured(given))
    keys = {problem.key.split(":")[0] for problem in caught.value.problems}
    assert keys == {"tp3", "dp16.full", "pp2.2f2b", "tp2[micro_batch=2]", "tp2["}


def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise WorkerError(
            "rank 1 failed:\n  File x\n  torch.OutOfMemoryError: CUDA out of memory. Tried to "
            "allocate 2.50 GiB. GPU 1 has\nLast lines"
        )

    monkeypatch.setattr("mtk.benchmarks.layouts.launch", fail)
    rows = bench_layouts(config("tp2"), Reporter(quiet=True))
    assert [row.failure for row in rows] == ["out of memory (tried to allocate 2.50 GiB)"] * 2
    assert cells(rows[1])[2] == rows[1].failure


def test_reasons() -> None:
    text = "rank 0 failed:\n  File y\n  ValueError: no such thing\nrank 1 was ended."
    assert reason(WorkerError(text)) == "ValueError: no such thing"
    assert reason(WorkerError("rank 1 was killed by SIGKILL.")) == "rank 1 was killed by SIGKILL."


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_of_known_gpus_only(name: str, known: str | None) -> None:
    assert known_gpu(name) == (GPUS[known] if known else None)
