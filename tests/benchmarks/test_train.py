"""The benchmark of one training: what it measures, what it is compared with, what it writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtk.benchmarks.plain_run import measure_plain
from mtk.benchmarks.timing import (
    Clock,
    Subject,
    kernels_per_step,
    measure,
    no_mark,
    parts_of,
)
from mtk.benchmarks.train_chart import _title, draw
from mtk.benchmarks.train_steps import measure_mtk
from mtk.benchmarks.training import (
    COLUMNS,
    Report,
    Row,
    bench_train,
    cells,
    content,
    part_cells,
    part_columns,
)
from mtk.data.indexed_dataset import IndexedDatasetWriter
from mtk.errors import ConfigError, DataError, WorkerError
from mtk.launch.process import Place
from mtk.log import Reporter
from mtk.training.profile import OTHER, Kernel, kernel_kind
from tests.benchmarks.tiny_training import EXPERTS, config


def in_this_process(function: Any, arguments: Any, *_: Any, **__: Any) -> Any:
    return function(Place(), *arguments)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure here: fresh ranks cost seconds and measure nothing else."""
    monkeypatch.setattr("mtk.benchmarks.training.launch", in_this_process)


# -- the whole program --------------------------------------------------------------------


@pytest.mark.usefixtures("at_once")
def test_both_are_measured_in_turn_and_written(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    report = bench_train(config(output=str(output), repeats=2), Reporter(quiet=True))
    mtk, plain = report.rows
    assert (mtk.name, plain.name) == ("mtk", "plain") and not mtk.failure + plain.failure
    assert plain.ratio == 1.0 and mtk.ratio == pytest.approx(plain.step_seconds / mtk.step_seconds)
    assert mtk.speed and mtk.speed.tokens_per_second == pytest.approx(256 / mtk.step_seconds)
    # The same weights, batches and learning rates: both train the same thing.
    assert mtk.typical[0].loss == pytest.approx(plain.typical[0].loss, rel=1e-4)
    assert mtk.typical[0].parameters == plain.typical[0].parameters
    assert all(len(run[0].seconds) == 3 for row in report.rows for run in row.runs)

    written = json.loads(output.read_text())
    assert {"date", "commit", "torch", "config", "config_digest", "gpus"} <= set(written)
    assert written["tokens_per_step"] == 256 and written["roofline"]["products"] == "fp32"
    assert [row["name"] for row in written["rows"]] == ["mtk", "plain"]
    for row in written["rows"]:
        assert len(row["runs"]) == 2 and row["roofline_fraction"] > 0 and row["step_seconds"] > 0
        assert 0 <= row["data_stall"] <= 1 and row["cpu_seconds"] > 0
        assert row["runs"][0][0]["build_seconds"] > 0
        assert row["runs"][0][0]["first_step_seconds"] > 0

    assert all(len(cells(row)) == len(COLUMNS) for row in report.rows)
    columns = part_columns(report.rows)
    assert set(columns[1:-1]) == {"data", "other", "forward", "backward", "optimizer"}
    assert all(len(part_cells(row, columns)) == len(columns) for row in report.rows)


@pytest.mark.usefixtures("at_once")
def test_mtk_alone(tmp_path: Path) -> None:
    report = bench_train(config(plain=False, roofline=False), Reporter(quiet=True))
    (row,) = report.rows
    assert row.ratio is None and row.roofline_fraction is None and cells(row)[2] == "-"
    assert content(report)["roofline"] == "not asked for"


@pytest.mark.usefixtures("at_once")
def test_what_is_not_written_is_a_row_with_the_reason() -> None:
    given = config(**EXPERTS, roofline=False, steps=1)
    mtk, plain = bench_train(given, Reporter(quiet=True)).rows
    assert mtk.speed is not None and mtk.ratio is None
    assert plain.skipped == "the plain loop has none of this: a mixture of experts"
    assert cells(plain)[:2] == ["plain", f"not measured: {plain.skipped}"]
    assert len(cells(plain)) == len(COLUMNS) and not plain.failure


def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise WorkerError(
            "rank 0 failed:\n  torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
        )

    monkeypatch.setattr("mtk.benchmarks.training.launch", fail)
    report = bench_train(config(), Reporter(quiet=True))
    assert [row.failure for row in report.rows] == ["out of memory (tried to allocate 2 GiB)"] * 2
    assert report.roofline_failure == report.rows[0].failure
    draw(report, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.usefixtures("at_once")
def test_bad_data_is_an_error_and_no_row(tmp_path: Path) -> None:
    prefix = tmp_path / "short_text_document"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(50), [50])
    given = config(data_path=[str(prefix)], mock_data=False, roofline=False)
    with pytest.raises(DataError, match="fewer than one sample"):
        bench_train(given, Reporter(quiet=True))


@pytest.mark.slow
def test_fresh_ranks() -> None:
    given = config(nproc=2, data_parallel_sharding="optimizer", roofline=False)
    mtk, plain = bench_train(given, Reporter(quiet=True)).rows
    assert len(mtk.runs[0]) == 2 and mtk.runs[0][0].loss == mtk.runs[0][1].loss
    assert plain.skipped == "the plain loop has none of this: 2 ranks"


def test_bad_options_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        config(profile_steps=-1, chart="a.pdf", rampup_batch_size=(1, 1, 8))
    keys = {problem.key for problem in caught.value.problems}
    assert {"profile_steps", "chart", "batch.rampup_batch_size"} <= keys


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    (run,) = measure_mtk(Place(), config(steps=1))
    kernels = kernels_per_step([Kernel("nvjet_x", 0.2, 4), Kernel("Memcpy DtoD", 0.1, 2)], 2)
    run = dataclasses.replace(run, kernels=kernels)
    given = config()
    report = Report(given, [], [Row("mtk", [[run]])])
    draw(report, tmp_path / "figures" / "train.png")
    assert (tmp_path / "figures" / "train.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(list((tmp_path / "figures").iterdir())) == 1
    assert ", not compiled" in _title(report)
    on_gpu = dataclasses.replace(report, hardware=[{"name": "NVIDIA H200"}])
    assert ", compiled" in _title(on_gpu)  # as is the default there


# -- the stopwatch ------------------------------------------------------------------------


class Hand:
    """The hand of a clock that moves when told; what it tells is as exact as a test needs."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def test_parts_add_up_to_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, mark = Hand(), no_mark
    monkeypatch.setattr("mtk.benchmarks.timing.time.perf_counter", hand)

    def batches() -> Iterator[int]:
        while True:
            hand.at += 0.5
            yield 0

    def step(batch: int) -> torch.Tensor:
        for name, seconds in (("forward", 2.0), ("backward", 3.0), ("forward", 1.0)):
            mark(name)
            hand.at += seconds
        return torch.tensor(float(batch))

    @contextmanager
    def marked(told: Any) -> Iterator[None]:
        nonlocal mark
        mark = told
        yield
        mark = no_mark

    subject = Subject(step, marked, batches(), torch.device("cpu"), 1, 0.0)
    run = measure(subject, config())
    assert run.seconds == (6.5,) * 3 and run.waits == (0.5,) * 3
    assert run.stall == pytest.approx(0.5 / 6.5) and run.first_step_seconds == 6.5
    assert run.split == {"data": 0.5, "other": 0.0, "forward": 3.0, "backward": 3.0}
    assert sum(run.split.values()) == run.seconds[0]


@pytest.mark.parametrize("measured", [measure_mtk, measure_plain])
def test_parts_of_real_steps(measured: Any) -> None:
    (run,) = measured(Place(), config(num_layers=4, hidden_size=64, steps=7, warmup=3))
    assert list(run.split)[:2] == ["data", "other"]
    assert set(run.split) == {"data", "other", "forward", "backward", "optimizer"}
    assert 0 <= run.stall <= 1 and all(part >= 0 for part in run.split.values())
    # Whatever else runs on the machine comes between a step and its parts.
    assert 0.1 < sum(run.split.values()) / sorted(run.seconds)[3] < 10


def test_marks_of_one_name_add_up() -> None:
    marks = [("a", 1.0), ("b", 2.0), ("a", 4.0), ("b", 4.5), ("", 6.0)]
    assert parts_of(marks, Clock(torch.device("cpu"))) == {"a": 1.5, "b": 3.5}


def test_marking_leaves_no_trace_on_the_stepper() -> None:
    from mtk.benchmarks.measured_run import prepare
    from mtk.benchmarks.train_steps import marked
    from mtk.parallel.ranks import Ranks

    _, stepper, batches = prepare(config(), Ranks(), 2)
    ranks, told = stepper.ranks, []
    with marked(stepper, told.append):
        stepper.step(next(batches), 0)
    assert told == ["other", *["forward", "backward", "optimizer"] * 2, "optimizer"]
    assert stepper.ranks is ranks
    assert "terms" not in vars(stepper.passes) and "collect_gradients" not in vars(stepper.main)
    stepper.step(next(batches), 2)
    assert len(told) == 8


def test_kernels_of_several_steps() -> None:
    found = kernels_per_step([Kernel("nvjet_a", 0.4, 8), Kernel("triton_poi_b", 0.2, 4)], 2)
    assert found.milliseconds == pytest.approx({"matrix products": 200, "fused": 100})
    assert found.count == 6
    assert found.top[0] == {
        "name": "nvjet_a",
        "kind": "matrix products",
        "milliseconds": pytest.approx(200),
        "calls": 4,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "matrix products"),
        ("sm80_xmma_gemm_f32f32_tf32f32", "matrix products"),
        ("triton_tem_fused_addmm_3", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Traits<cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80", "attention"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_transpose_2", "fused"),
        ("triton_red_fused_native_layer_norm_0", "fused"),
        ("_cross_entropy_forward", "fused"),
        (
            "void multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata, FusedAdam>",
            "optimizer",
        ),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>", OTHER),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind
