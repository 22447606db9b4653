"""The picture of ``mtk bench serve``: what throughput costs in latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.bench.serve import Report
from serving.bench.summary import Point, Spread

COLOURS = {"p50": "#4477aa", "p90": "#ccbb44", "p99": "#ee6677"}
PANELS = {
    "first": ("time to first text, ms", 1e3),
    "gap": ("between texts, ms", 1e3),
    "whole": ("whole answer, s", 1.0),
}


def draw(report: Report, path: Path) -> None:
    """Write a PNG; points of which nothing was answered are not in it."""
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    load = report.config.traffic
    figure.suptitle(
        f"{report.model.name}: prompts of {load.prompt_tokens}, answers of {load.new_tokens} tokens"
    )
    for axes, (name, (title, scale)) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for points, style in (
            ([point for point in report.points if point.clients], "-"),
            ([point for point in report.points if not point.clients], "--"),
        ):
            _lines(axes, points, name, scale, style)
        axes.set_xlabel("new tokens per second, all clients")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120, metadata={"Software": "mtk"})
    temporary.replace(path)


def _lines(axes: Any, points: Sequence[Point], name: str, scale: float, style: str) -> None:
    """One line a percentile, along the sweep; labels tell clients or requests a second."""
    found: list[tuple[Point, Spread]] = [
        (point, spread) for point in points if (spread := getattr(point, name)) is not None
    ]
    if not found:
        return
    across = [point.tokens_per_second for point, _ in found]
    kind = "closed" if found[0][0].clients else "open"
    for percentile, colour in COLOURS.items():
        up = [scale * getattr(spread, percentile) for _, spread in found]
        axes.plot(across, up, style, marker="o", color=colour, label=f"{percentile}, {kind} loop")
    for point, spread in found:
        text = str(point.clients) if point.clients else f"{point.rate:g}/s"
        at = (point.tokens_per_second, scale * spread.p50)
        axes.annotate(text, at, textcoords="offset points", xytext=(4, 4), fontsize=8)
