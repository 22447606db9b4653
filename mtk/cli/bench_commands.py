"""``mtk bench``: how fast, and how much memory, on the machine at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from mtk.cli.options import CommonOptions, add_command

TRAIN = "mtk.config.bench:TrainBenchConfig"
LAYOUTS = "mtk.config.bench:LayoutsBenchConfig"
RECOMPUTE = "mtk.config.bench:RecomputeBenchConfig"
OPTIMIZER_MEMORY = "mtk.config.bench:OptimizerMemoryConfig"
PREPROCESS = "mtk.config.bench_preprocess:PreprocessBenchConfig"
FAMILIES = "mtk.config.bench_families:FamiliesBenchConfig"
INDEX = "mtk.config.bench_index:IndexBenchConfig"
SERVE = "mtk.config.bench_serve:ServeBenchConfig"
DECODE = "mtk.config.bench_decode:DecodeBenchConfig"


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the commands to the group ``bench``."""
    del app
    bench = parents["bench"]
    help = "A training's speed, beside a plain PyTorch loop and what the device could do."
    add_command(bench, "train", TRAIN, _train, help=help)
    help = "The same training in one layout after the other: tokens/s, memory, MFU, speed-up."
    add_command(bench, "layouts", LAYOUTS, _layouts, help=help)
    help = "Memory and time of each way to recompute activations, beside the planner's formula."
    add_command(bench, "recompute", RECOMPUTE, _recompute, help=help)
    help = "Bytes a parameter of every data-parallel rank, counted on CPU ranks, beside theory."
    add_command(bench, "optimizer-memory", OPTIMIZER_MEMORY, _optimizer_memory, help=help)
    help = "Every family learns a text by heart, trains on two ranks as on one, and resumes."
    add_command(bench, "families", FAMILIES, _families, help=help)
    help = "Time and memory of the index of a GPT dataset's samples."
    add_command(bench, "index", INDEX, _index, help=help)

    help = "MB/s of preprocess beside the engine alone, tokenizers, datatrove and Megatron's way."
    add_command(bench, "preprocess", PREPROCESS, _preprocess, help=help)
    help = "A server under rising load: tokens/s, time to first text, latency percentiles, errors."
    add_command(bench, "serve", SERVE, _serve, help=help)
    help = "Reading prompts and decoding: tokens/s, MFU, bandwidth, beside transformers."
    add_command(bench, "decode", DECODE, _decode, help=help)


def _resolved(name: str, config: str, given: dict[str, Any], common: CommonOptions) -> Any:
    from mtk.cli.stage_commands import layers_from
    from stages.registry import Stage

    # A benchmark resolves as a stage does (recipe lowest) without being one.
    return Stage(name, config, "", "").resolve(layers_from(given, common))


def _train(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.benchmarks.train_chart import draw
    from mtk.benchmarks.training import (
        COLUMNS,
        bench_train,
        cells,
        part_cells,
        part_columns,
        plain_row,
    )
    from mtk.errors import GateError
    from mtk.log import Reporter

    config = _resolved("train", TRAIN, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    report = bench_train(config, reporter)
    if config.chart is not None:
        draw(report, Path(config.chart))
    columns, measured = part_columns(report.rows), [row for row in report.rows if row.runs]
    tables = [_table(COLUMNS, [cells(row) for row in report.rows])]
    if measured:
        tables.append(_table(columns, [part_cells(row, columns) for row in measured]))
    rows = [plain_row(row) for row in report.rows]
    reporter.result("\n".join(tables), rows=rows, output=config.measure.output)
    failed = [f"{row.name}: {row.failure}" for row in report.rows if row.failure]
    if failed:
        raise GateError("; ".join(failed))


def _layouts(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.benchmarks.layouts import COLUMNS, bench_layouts, cells, plain
    from mtk.log import Reporter

    config = _resolved("layouts", LAYOUTS, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    rows = bench_layouts(config, reporter)
    table = _table(COLUMNS, [cells(row) for row in rows])
    reporter.result(table, layouts=[plain(row) for row in rows], output=config.measure.output)


def _recompute(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.benchmarks.recomputation import COLUMNS, bench_recompute, cells, plain
    from mtk.log import Reporter

    config = _resolved("recompute", RECOMPUTE, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    rows = bench_recompute(config, reporter)
    table = _table(COLUMNS, [cells(row) for row in rows])
    reporter.result(table, rows=[plain(row) for row in rows], output=config.measure.output)


def _optimizer_memory(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.benchmarks.optimizer_memory import COLUMNS, bench_optimizer_memory, cells, plain
    from mtk.log import Reporter

    config = _resolved("optimizer-memory", OPTIMIZER_MEMORY, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    rows = bench_optimizer_memory(config, reporter)
    table = _table(COLUMNS, [cells(row) for row in rows])
    reporter.result(table, rows=[plain(row) for row in rows], output=config.output)


def _families(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.benchmarks.families.corpus import Stages
    from mtk.benchmarks.families.program import COLUMNS, bench_families, cells, plain
    from mtk.errors import GateError
    from mtk.log import Reporter
    from stages import preprocess, pretrain, tokenizer

    config = _resolved("families", FAMILIES, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    functions = Stages(tokenizer.run, preprocess.run, pretrain.run)
    rows = bench_families(config, functions, reporter)
    table = _table(COLUMNS, [cells(row) for row in rows])
    reporter.result(table, families=[plain(row) for row in rows], output=config.output)
    failed = [f"{row.sample.name}: {text}" for row in rows for text in row.failures]
    if failed:
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise GateError(f"{'; '.join(failed[:3])}{more}.")


def _index(given: dict[str, Any], common: CommonOptions) -> None:
    from dataclasses import asdict

    from mtk.benchmarks.index import COLUMNS, bench_index, cells
    from mtk.log import Reporter

    config = _resolved("index", INDEX, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    row = bench_index(config, reporter)
    reporter.result(_table(COLUMNS, [cells(row)]), index=asdict(row), output=config.output)


def _preprocess(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.benchmarks.preprocessing.program import COLUMNS, bench_preprocess, cells, plain
    from mtk.log import Reporter
    from stages import preprocess

    config = _resolved("preprocess", PREPROCESS, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    rows = bench_preprocess(config, preprocess.run, reporter)
    table = _table(COLUMNS, [cells(row) for row in rows])
    reporter.result(table, rows=[plain(row) for row in rows], output=config.output)


def _serve(given: dict[str, Any], common: CommonOptions) -> None:
    from flows.guard import start_guarded, stop
    from mtk.errors import WorkerError
    from mtk.log import Reporter
    from serving.bench.serve import COLUMNS, bench_serve, cells
    from serving.bench.serve_chart import draw
    from serving.bench.summary import plain

    config = _resolved("serve", SERVE, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    # A server somewhere else says nothing about its hardware.
    hardware = _hardware(reporter) if config.server.load is not None else []
    report = bench_serve(config, reporter, start=start_guarded, stop=stop, hardware=hardware)
    if config.chart is not None:
        draw(report, Path(config.chart))
    table = _table(COLUMNS, [cells(point) for point in report.points])
    points = [{**plain(point), "requests": None} for point in report.points]
    reporter.result(table, points=points, output=config.output)
    silent = [point.name for point in report.points if not point.answered]
    if silent:
        raise WorkerError(f"no request was answered with {', '.join(silent)}; the table says why.")


def _decode(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.log import Reporter
    from serving.bench.decode import bench_decode
    from serving.bench.decode_rows import COLUMNS, cells, plain

    config = _resolved("decode", DECODE, given, common).config
    reporter = Reporter(json_lines=common.json_lines)
    hardware = _hardware(reporter) if config.device != "cpu" else []
    report = bench_decode(config, reporter, _exported, hardware)
    table = _table(COLUMNS, [cells(report, row) for row in report.rows])
    rows = [{**plain(report, row), "runs": None} for row in report.rows]
    reporter.result(table, rows=rows, skipped=report.skipped, output=config.output)


@contextmanager
def _exported(load: str) -> Iterator[Path]:
    """The model as a folder that transformers reads; it is converted for that if it must be."""
    import tempfile

    from mtk.config import make
    from mtk.config.convert import ConvertConfig
    from mtk.convert.source import find_source
    from mtk.log import Reporter
    from mtk.session import Session
    from stages import convert

    source = find_source(load)
    if source.kind == "hf":
        yield source.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        # Its own bar is stricter; here the tokens of both are compared besides.
        config = make(ConvertConfig, load=load, save=str(target), to="hf", tolerance=1e-2)
        convert.run(config, Session(Reporter(quiet=True)))
        yield target


def _hardware(reporter: Any) -> list[dict[str, Any]]:
    """The first GPU of this machine, if it has one."""
    import torch

    from mtk.benchmarks.speed import hardware_of

    return hardware_of("cuda" if torch.cuda.device_count() else "cpu", 1, reporter)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A rich table as text, as wide as it needs to be."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    stream = StringIO()
    Console(file=stream, width=200, markup=False).print(table)
    return stream.getvalue().rstrip()
