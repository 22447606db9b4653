"""A picture of how long the documents of a dataset are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 60


def draw_lengths(lengths: npt.NDArray[np.integer[Any]], name: str, path: Path) -> None:
    """Two histograms over length, on a logarithmic axis: of documents, and of the tokens in
    them, which says where the training's tokens come from. Replaces the PNG file as a whole."""
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    filled = lengths[lengths > 0]
    longest = int(filled.max(initial=1))
    edges = np.unique(np.geomspace(1, longest + 1, BINS + 1).round())
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.hist(filled, bins=edges)
    upper.set_ylabel("documents")
    lower.hist(filled, bins=edges, weights=filled)
    lower.set_ylabel("tokens in them")
    lower.set_xscale("log")
    lower.set_xlabel("tokens of a document")
    empty = len(lengths) - len(filled)
    left_out = f", {empty:,} empty ones not shown" if empty else ""
    upper.set_title(f"{name}: {len(lengths):,} documents{left_out}", fontsize=10)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    # A temporary name, so that a kill never leaves half a picture.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120, metadata={"Software": "mtk"})
    temporary.replace(path)
