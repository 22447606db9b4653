"""``mtk bench train``: one training, measured beside a plain PyTorch loop and what the device
could do.

mtk and the plain loop take turns, each in fresh ranks; the device's own rates are measured
before, in the same run. What fails or cannot be compared is a row with the reason.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtk.benchmarks.layouts import reason
from mtk.benchmarks.plain_run import measure_plain, not_written
from mtk.benchmarks.record import surroundings, write_json
from mtk.benchmarks.roofline import Roofline, measure_roofline, not_counted
from mtk.benchmarks.speed import Speed, hardware_of, slowest, speed_of
from mtk.benchmarks.timing import TrainRun
from mtk.benchmarks.train_steps import measure_mtk
from mtk.config import config_digest, to_dict
from mtk.config.bench import TrainBenchConfig
from mtk.errors import ConfigError, DataError, Interrupted, MtkError
from mtk.launch.local import launch
from mtk.log import Reporter
from mtk.models.count_families import flops_per_token, parameters
from mtk.parallel.apply import training_device
from mtk.training.compiled import compiles
from mtk.training.data import with_vocabulary
from mtk.training.opened_data import open_data

# A measurement of all ranks.
Run = Sequence[TrainRun]
SUBJECTS: dict[str, Callable[..., list[TrainRun]]] = {"mtk": measure_mtk, "plain": measure_plain}


@dataclass(frozen=True)
class Row:
    """One of the trainings. ratio: of its tokens/s to the plain loop's; roofline_fraction:
    share of a step that its products and attention would take alone; None where there is nothing
    to compare with. skipped: why it was not measured; failure: what ended it."""

    name: str
    runs: Sequence[Run] = ()
    speed: Speed | None = None
    ratio: float | None = None
    roofline_fraction: float | None = None
    skipped: str = ""
    failure: str = ""

    @property
    def typical(self) -> Run:
        """The run of median speed, of two the faster."""
        runs = sorted(self.runs, key=step_seconds)
        return runs[(len(runs) - 1) // 2]

    @property
    def step_seconds(self) -> float:
        """The median run's median step."""
        return statistics.median(step_seconds(run) for run in self.runs)

    @property
    def peak_allocated(self) -> list[int]:
        """Bytes of each rank, the most of all runs; zeros on the CPU."""
        peaks = zip(*([rank.peak_allocated or 0 for rank in run] for run in self.runs), strict=True)
        return [max(peak) for peak in peaks]

    def median(self, figure: Callable[[TrainRun], float]) -> float:
        """Of all runs; of each that of its worst rank."""
        return statistics.median(max(figure(rank) for rank in run) for run in self.runs)


@dataclass(frozen=True)
class Report:
    """config: with the vocabulary of the data. roofline_failure: why there is no roofline."""

    config: TrainBenchConfig
    hardware: Sequence[dict[str, Any]]
    rows: Sequence[Row]
    roofline: Roofline | None = None
    roofline_failure: str = ""


def step_seconds(run: Run) -> float:
    """The median step of the job."""
    return statistics.median(slowest([rank.seconds for rank in run]))


def bench_train(config: TrainBenchConfig, reporter: Reporter) -> Report:
    """Measure all that is asked for; the JSON file is complete after each measurement. Raises
    ConfigError and DataError; what else ends a training is in its row."""
    config = with_vocabulary(config, open_data(config.data))  # type: ignore[assignment]
    place = training_device(config.runtime)
    # As it is then recorded and titled: whether blocks are compiled may depend on the device.
    runtime = dataclasses.replace(config.runtime, compile=compiles(config, place))
    config, device = dataclasses.replace(config, runtime=runtime), place.type
    hardware = hardware_of(device, config.parallel.nproc, reporter)
    roofline, why = _roofline(config, device, reporter)
    found: dict[str, list[Run]] = {"mtk": [], **({"plain": []} if config.plain else {})}
    skipped, failures = {"plain": not_written(config)}, dict[str, str]()
    report = Report(config, hardware, [], roofline, why)
    for turn in range(config.measure.repeats):
        for name, runs in found.items():
            if not skipped.get(name) and not failures.get(name):
                reporter.info(f"{name}, run {turn + 1} of {config.measure.repeats} ...")
                try:
                    runs.append(_launch(SUBJECTS[name], config, device))
                    reporter.info(f"{name}: {step_seconds(runs[-1]):.4f} s a step")
                except (ConfigError, DataError, Interrupted):
                    raise  # the next one would fail in the same way
                except MtkError as error:
                    failures[name] = reason(error)
                    reporter.info(f"{name}: {failures[name]}")
            rows = _rows(report, found, skipped, failures)
            report = dataclasses.replace(report, rows=rows)
            write_json(config.measure.output, content(report))
    return report


def _launch(subject: Callable[..., Any], config: TrainBenchConfig, device: str) -> Any:
    ranks, timeout = config.parallel.nproc, config.parallel.timeout_seconds
    return launch(subject, (config,), ranks, device=device, timeout=timeout)


def _roofline(
    config: TrainBenchConfig, device: str, reporter: Reporter
) -> tuple[Roofline | None, str]:
    """And why there is none."""
    if not config.roofline:
        return None, "not asked for"
    missing = not_counted(config)
    if missing:
        reporter.info(f"roofline: not measured: {missing}")
        return None, f"not measured: {missing}"
    try:
        found: Roofline = launch(measure_roofline, (config,), device=device)
    except Interrupted:
        raise
    except MtkError as error:
        return None, reason(error)
    text = f"{found.seconds:.4f} s a step for products and attention in {found.products} alone"
    reporter.info(f"roofline: {text}")
    return found, ""


def _rows(
    report: Report,
    found: dict[str, list[Run]],
    skipped: dict[str, str],
    failures: dict[str, str],
) -> list[Row]:
    rows, config, roofline = [], report.config, report.roofline
    plain = statistics.median(map(step_seconds, found["plain"])) if found.get("plain") else None
    for name, runs in found.items():
        row = Row(name, runs, skipped=skipped.get(name, ""), failure=failures.get(name, ""))
        if runs:
            seconds = row.step_seconds
            row = dataclasses.replace(
                row,
                speed=speed_of(config, seconds, config.parallel.nproc, report.hardware),
                ratio=plain / seconds if plain else None,
                roofline_fraction=roofline.seconds / seconds if roofline else None,
            )
        rows.append(row)
    return rows


# -- output -------------------------------------------------------------------------------


def content(report: Report) -> dict[str, Any]:
    """All figures as plain data; bytes, seconds, plain numbers."""
    config, roofline = report.config, report.roofline
    return {
        "benchmark": "train",
        **surroundings(),
        "gpus": list(report.hardware),
        "config": to_dict(config),
        "config_digest": config_digest(config),
        "parameters": parameters(config.model),
        "tokens_per_step": config.batch.full * config.model.seq_length,
        "flops_per_token": vars(flops_per_token(config.model)),
        "roofline": dataclasses.asdict(roofline) if roofline else report.roofline_failure,
        "rows": [plain_row(row) for row in report.rows],
    }


def plain_row(row: Row) -> dict[str, Any]:
    """As plain data, every run and rank in it."""
    plain = dataclasses.asdict(row)
    if row.runs:
        plain["step_seconds"] = row.step_seconds
        plain["cpu_seconds"] = row.median(lambda rank: statistics.median(rank.cpu_seconds))
        plain["data_stall"] = row.median(lambda rank: rank.stall)
        plain["peak_allocated_bytes"] = row.peak_allocated
        plain["split"] = row.typical[0].split
    return plain


COLUMNS = (
    "",
    "tokens/s",
    "ratio",
    "MFU full",
    "MFU causal",
    "s/step",
    "roofline",
    "peak GB",
    "first step s",
    "data stall",
    "loss",
)


def cells(row: Row) -> list[str]:
    """The row's texts under ``COLUMNS``."""
    if row.speed is None:
        why = f"not measured: {row.skipped}" if row.skipped else row.failure
        return [row.name, why, *[""] * (len(COLUMNS) - 2)]
    mfu, peaks = row.speed.mfu, row.peak_allocated
    return [
        row.name,
        f"{row.speed.tokens_per_second:,.0f}",
        f"{row.ratio:.3f}" if row.ratio else "-",
        f"{mfu.full:.1%}" if mfu else "-",
        f"{mfu.causal:.1%}" if mfu else "-",
        f"{row.step_seconds:.4f}",
        f"{row.roofline_fraction:.1%}" if row.roofline_fraction else "-",
        " ".join(f"{peak / 1e9:.2f}" for peak in peaks) if any(peaks) else "-",
        f"{row.median(lambda rank: rank.first_step_seconds):.2f}",
        f"{row.median(lambda rank: rank.stall):.1%}",
        f"{row.typical[0].loss:.4f}",
    ]


def part_columns(rows: Sequence[Row]) -> list[str]:
    """Of the table of parts: all that a step of any row has."""
    names = [name for row in rows if row.runs for name in row.typical[0].split]
    return ["ms of a step", *dict.fromkeys(names), "all"]


def part_cells(row: Row, columns: Sequence[str]) -> list[str]:
    """Milliseconds of rank 0 under ``columns``."""
    split = row.typical[0].split
    parts = [f"{1e3 * split[name]:.1f}" if name in split else "-" for name in columns[1:-1]]
    return [row.name, *parts, f"{1e3 * sum(split.values()):.1f}"]
