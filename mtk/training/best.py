"""Which checkpoint of a run did best on the held-out data: ``best.json`` beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEST = "best.json"


class Best:
    """The best step so far below ``folder``.

    figure: of an evaluation; with ``-`` in front the lowest is best, else the highest. step: of
    the run; what a later one left (it was killed, and goes on from here) is forgotten.
    """

    def __init__(self, folder: Path, figure: str, step: int) -> None:
        self.path = folder / BEST
        self.name, self.sign = figure.removeprefix("-"), -1 if figure.startswith("-") else 1
        self.step: int | None = None
        self.value = -self.sign * math.inf
        known = _read(self.path)
        if self.name in known and known["step"] <= step:
            self.step, self.value = known["step"], known[self.name]

    def offer(self, step: int, figures: Mapping[str, Any]) -> None:
        """Note ``step`` if none before did as well; of equals the first stays."""
        value = figures[self.name]
        if not self.sign * value > self.sign * self.value:
            return
        self.step, self.value = step, value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": step, self.name: value}) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    @property
    def text(self) -> str:
        return "" if self.step is None else f"best: step {self.step}, {self.name} {self.value:.4f}"


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("step"), int) else {}
