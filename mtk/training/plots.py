"""Loss and throughput of a run as PNG files, from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtk.training.metrics import read_metrics


def write_plots(metrics: Path, folder: Path) -> list[Path]:
    """Write ``loss.png`` and ``throughput.png``; nothing when there is nothing to show."""
    records = read_metrics(metrics)
    train = [r for r in records if r.get("event") == "train"]
    evaluations = [r for r in records if r.get("event") == "eval"]
    if not train:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    _draw(folder / "loss.png", _loss_lines(train, evaluations), "loss (nats per token)")
    speed = [("tokens per second", train, "tokens_per_second", "-")]
    _draw(folder / "throughput.png", speed, "tokens per second")
    if any("bits_per_byte" in record for record in evaluations):
        lines = [("held-out", evaluations, "bits_per_byte", "o-")]
        _draw(folder / "bits_per_byte.png", lines, "bits per byte, held-out")
    return sorted(folder.glob("*.png"))


Line = tuple[str, list[dict[str, Any]], str, str]


def _loss_lines(train: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[Line]:
    lines: list[Line] = [("training", train, "loss", "-")]
    if evaluations:
        lines.append(("held-out", evaluations, "loss", "o-"))
    return lines


def _draw(path: Path, lines: Sequence[Line], label: str) -> None:
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, records, key, style in lines:
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, style, label=name, markersize=4, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    # A temporary name, so that a kill never leaves half a picture.
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120, metadata={"Software": "mtk"})
    temporary.replace(path)
