"""Loss curves as one PNG, a panel for each family."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mtk.benchmarks.families.training import Curve

COLUMNS = 5


def write_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """Draw loss over steps and the bound; nothing when there is nothing to show."""
    if not curves:
        return
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.0 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (name, curve) in zip(panels, curves.items(), strict=False):
        steps, losses = zip(*curve.points, strict=True)
        axes.semilogy(steps, losses, linewidth=1.2)
        axes.axhline(curve.bound, color="tab:red", linestyle="--", linewidth=0.8)
        axes.set_title(f"{name}: {curve.last:.3f}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[len(curves) :]:
        axes.remove()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss (nats per predicted token); dashed: bound", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A temporary name, so that a kill never leaves half a picture.
    temporary = path.with_suffix(f".{os.getpid()}.tmp.png")
    figure.savefig(temporary, dpi=90, metadata={"Software": "mtk"})
    temporary.replace(path)
