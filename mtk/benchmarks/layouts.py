"""``mtk bench layouts``: the same training in one layout after the other.

Every layout takes the same number of samples a step and starts fresh ranks. A layout that
fails is a row with the reason. Speed-ups are over one process, which comes first.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtk.benchmarks.measured_run import RankRun, run_steps
from mtk.benchmarks.record import surroundings, write_json
from mtk.benchmarks.speed import hardware_of, slowest, speed_of
from mtk.config import Layer, config_digest, resolve, to_dict
from mtk.config.bench import LayoutsBenchConfig
from mtk.config.parallel import ParallelConfig
from mtk.errors import ConfigError, Interrupted, MtkError, Problem
from mtk.launch.local import launch
from mtk.log import Reporter
from mtk.models.count import Flops, flops_per_token, parameter_count
from mtk.parallel.apply import training_device
from mtk.parallel.layout_names import parse

BASELINE = "single"
_OVERRIDES = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<options>[^\[\]]*)\])?")


@dataclass(frozen=True)
class Row:
    """One layout. tokens_per_second: of the whole job, the median step of the median run;
    speedup: over one process (None without one). mfu: share of the GPUs' dense bf16 peak, by
    both ways to count attention; None where the peak is unknown. failure: why there are no
    figures."""

    layout: str
    ranks: int
    config_digest: str
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None
    mfu: Flops | None = None
    flops_per_gpu: Flops | None = None
    loss: float | None = None
    runs: Sequence[Sequence[RankRun]] = ()
    failure: str = ""

    @property
    def peak_allocated(self) -> list[int]:
        """Bytes of each rank, the most of all runs."""
        peaks = zip(*([rank.peak_allocated or 0 for rank in run] for run in self.runs), strict=True)
        return [max(peak) for peak in peaks]


def bench_layouts(config: LayoutsBenchConfig, reporter: Reporter) -> list[Row]:
    """Measure all layouts; the JSON file is complete after each. Raises ConfigError for a
    layout that is not legal, before anything starts."""
    prepared = list(configured(config))
    device = training_device(config.runtime).type
    hardware = hardware_of(device, max(layout.parallel.nproc for _, layout in prepared), reporter)
    rows: list[Row] = []
    for name, layout in prepared:
        reporter.info(f"{name}: {layout.parallel.nproc} ranks ...")
        row = _with_speedup(_row(name, layout, device, hardware), rows)
        rows.append(row)
        reporter.info(f"{name}: {told(row)}")
        write_json(config.measure.output, content(config, hardware, rows))
    return rows


def configured(config: LayoutsBenchConfig) -> Iterator[tuple[str, LayoutsBenchConfig]]:
    """Every layout's whole configuration, one process first. Raises ConfigError with the
    problems of all layouts."""
    names = [name for name in config.layout if name != BASELINE]
    problems: list[Problem] = []
    found = []
    for name in (BASELINE, *names):
        try:
            found.append((name, _configure(config, name)))
        except ConfigError as error:
            problems += [dataclasses.replace(p, key=f"{name}: {p.key}") for p in error.problems]
    if problems:
        raise ConfigError(problems)
    yield from found


def _configure(config: LayoutsBenchConfig, text: str) -> LayoutsBenchConfig:
    match = _OVERRIDES.fullmatch(text)
    if match is None:
        raise ConfigError([Problem("layout", text, "is not NAME or NAME[option=value,...]")])
    layout = parse(match["name"])
    own = {
        f"parallel.{field.name}": getattr(layout, field.name)
        for field in dataclasses.fields(ParallelConfig)
        if getattr(layout, field.name) != field.default
    }
    options = [item.partition("=") for item in (match["options"] or "").split(",") if item]
    layers = [
        Layer("command line", _given(to_dict(config))),
        Layer(f"layout {match['name']}", own),
        Layer(f"options of {text}", {key.strip(): value.strip() for key, _, value in options}),
    ]
    return resolve(LayoutsBenchConfig, layers).config


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without what was left open: text has no None."""
    nested = {k: _given(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {key: value for key, value in nested.items() if value is not None}


def _row(
    name: str, config: LayoutsBenchConfig, device: str, hardware: Sequence[dict[str, Any]]
) -> Row:
    ranks, digest = config.parallel.nproc, config_digest(config)
    runs: list[list[RankRun]] = []
    try:
        for _ in range(config.measure.repeats):
            timeout = config.parallel.timeout_seconds
            runs.append(launch(run_steps, (config,), ranks, device=device, timeout=timeout))
    except Interrupted:
        raise
    except MtkError as error:
        return Row(name, ranks, digest, failure=reason(error))
    seconds = statistics.median(
        statistics.median(slowest([rank.seconds for rank in run])) for run in runs
    )
    speed = speed_of(config, seconds, ranks, hardware)
    return Row(
        name,
        ranks,
        digest,
        step_seconds=seconds,
        tokens_per_second=speed.tokens_per_second,
        mfu=speed.mfu,
        flops_per_gpu=speed.flops_per_gpu,
        loss=runs[-1][0].losses[-1],
        runs=runs,
    )


def _with_speedup(row: Row, rows: Sequence[Row]) -> Row:
    base = rows[0].tokens_per_second if rows else row.tokens_per_second
    if not base or not row.tokens_per_second:
        return row
    return dataclasses.replace(row, speedup=row.tokens_per_second / base)


def reason(error: MtkError) -> str:
    """One line of what a failed job says."""
    text = str(error)
    if "OutOfMemoryError" in text or "out of memory" in text:
        tried = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return "out of memory" + (f" (tried to allocate {tried[1]})" if tried else "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"(Error|Exception)\b.*:", line)]
    return (named or lines or ["failed"])[-1][:300]


# -- output -------------------------------------------------------------------------------


def content(
    config: LayoutsBenchConfig, hardware: Sequence[dict[str, Any]], rows: Sequence[Row]
) -> dict[str, Any]:
    """All figures as plain data; bytes, seconds, plain numbers."""
    per_token = flops_per_token(config.model)
    return {
        "benchmark": "layouts",
        **surroundings(),
        "gpus": list(hardware),
        "config": to_dict(config),
        "config_digest": config_digest(config),
        "parameters": parameter_count(config.model),
        "tokens_per_step": config.batch.full * config.model.seq_length,
        "flops_per_token": vars(per_token),
        "layouts": [plain(row) for row in rows],
    }


def plain(row: Row) -> dict[str, Any]:
    plain = dataclasses.asdict(row)
    if row.runs:
        plain["peak_allocated_bytes"] = row.peak_allocated
    return plain


def told(row: Row) -> str:
    """A row in a line, for those who wait."""
    if row.tokens_per_second is None:
        return row.failure
    text = f"{row.tokens_per_second:,.0f} tokens/s, {row.step_seconds:.4f} s a step"
    return text + (f", {row.speedup:.2f} x one process" if row.speedup else "")


COLUMNS = (
    "layout",
    "ranks",
    "tokens/s",
    "speed-up",
    "s/step",
    "MFU full",
    "MFU causal",
    "peak GB a rank",
    "loss",
)


def cells(row: Row) -> list[str]:
    """The row's texts under ``COLUMNS``."""
    if row.tokens_per_second is None:
        return [row.layout, str(row.ranks), row.failure, *[""] * 6]
    peaks = row.peak_allocated
    return [
        row.layout,
        str(row.ranks),
        f"{row.tokens_per_second:,.0f}",
        f"{row.speedup:.2f}" if row.speedup else "-",
        f"{row.step_seconds:.4f}",
        f"{row.mfu.full:.1%}" if row.mfu else "-",
        f"{row.mfu.causal:.1%}" if row.mfu else "-",
        " ".join(f"{peak / 1e9:.2f}" for peak in peaks) if any(peaks) else "-",
        f"{row.loss:.4f}",
    ]
