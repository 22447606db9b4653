"""The picture of ``mtk bench train``: speeds side by side, and what a step consists of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mtk.benchmarks.training import Report, Row
from mtk.models.count_families import parameters
from mtk.training.compiled import compiles

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")


def draw(report: Report, path: Path) -> None:
    """Write a PNG; of rows that failed there is nothing in it. Without rows none is written."""
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.runs]
    if not rows:
        return
    kernels = {row.name: row.typical[0].kernels for row in rows}
    times = {name: found.milliseconds for name, found in kernels.items() if found}
    panels = 3 if times else 2
    figure = Figure(figsize=(4.4 * panels, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(report))
    axes = figure.subplots(1, panels)
    _speeds(axes[0], rows)
    parts = {row.name: {name: 1e3 * s for name, s in row.typical[0].split.items()} for row in rows}
    _stacked(axes[1], parts, "parts of a step")
    if times:
        _stacked(axes[2], times, "kernels of a step by kind")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120, metadata={"Software": "mtk"})
    temporary.replace(path)


def _title(report: Report) -> str:
    config = report.config
    model, name = config.model, report.hardware[0]["name"] if report.hardware else "CPU"
    size = f"{parameters(model) / 1e6:,.1f} M parameters, {model.num_layers} layers"
    batch = f"{config.batch.full} x {model.seq_length} tokens a step"
    # GPUs are listed where they train.
    device = torch.device("cuda" if report.hardware else "cpu")
    compiled = "compiled" if compiles(config, device) else "not compiled"
    return f"{size}, {batch}, {config.precision.precision}, {compiled}\n{name}"


def _speeds(axes: Any, rows: Sequence[Row]) -> None:
    names = [row.name for row in rows]
    speeds = [row.speed for row in rows if row.speed is not None]
    bars = axes.bar(names, [s.tokens_per_second for s in speeds], width=0.6, color=COLOURS[:2])
    texts = [
        f"{s.tokens_per_second:,.0f}" + (f"\nMFU {s.mfu.full:.1%}" if s.mfu else "") for s in speeds
    ]
    axes.bar_label(bars, texts, padding=2)
    axes.margins(y=0.18)
    axes.set_ylabel("tokens per second")
    axes.set_title("speed")


def _stacked(axes: Any, parts: dict[str, dict[str, float]], title: str) -> None:
    """parts: milliseconds by name, of each bar."""
    names = list(dict.fromkeys(name for bar in parts.values() for name in bar))
    below = dict.fromkeys(parts, 0.0)
    most = max(sum(bar.values()) for bar in parts.values())
    for index, name in enumerate(names):
        heights = [bar.get(name, 0.0) for bar in parts.values()]
        colour = COLOURS[index % len(COLOURS)]
        bars = axes.bar(
            list(parts), heights, 0.6, bottom=list(below.values()), label=name, color=colour
        )
        # No text where there is no room for it.
        texts = [f"{height:.1f}" if height > most / 25 else "" for height in heights]
        axes.bar_label(bars, texts, label_type="center", color="white", fontsize=8)
        below = {bar: below[bar] + height for bar, height in zip(parts, heights, strict=True)}
    axes.margins(y=0.12)
    axes.set_ylabel("milliseconds")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
