"""Options of ``mtk bench families``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from mtk.config.family_samples import FAMILY_SAMPLES
from mtk.config.schema import option
from mtk.errors import Problem

CHECKS = ("overfit", "layouts", "resume")


@dataclass(frozen=True, kw_only=True)
class FamiliesBenchConfig:
    """Everything ``mtk bench families`` needs."""

    family: tuple[str, ...] = option((), help="Families to check (default: all of them).")
    checks: tuple[str, ...] = option(
        CHECKS,
        help="overfit: each learns a text by heart; layouts: two ranks train as one process "
        "does; resume: a run that stopped and continued ends in the same bytes.",
    )
    steps: int | None = option(None, help="Steps of the overfit (default: the family's own).")
    seed: int = option(1234, help="Seed of weights, data order and dropout.")
    output: str = option(
        help="Folder of families.json, curves.png and a curve of each family; what it holds of "
        "other families stays.",
        runtime=True,
    )

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the rows, in the order of the table."""
        return tuple(name for name in FAMILY_SAMPLES if not self.family or name in self.family)

    def problems(self) -> Iterator[Problem]:
        for key, legal in (("family", tuple(FAMILY_SAMPLES)), ("checks", CHECKS)):
            for name in getattr(self, key):
                if name not in legal:
                    near = difflib.get_close_matches(name, legal, n=1)
                    fix = f"Nearest: {near[0]}." if near else ""
                    yield Problem(key, name, f"must be one of {', '.join(legal)}", fix)
        if not self.checks:
            yield Problem("checks", self.checks, "checks nothing", "Leave it out for all.")
        if self.steps is not None and self.steps < 1:
            yield Problem("steps", self.steps, "must be at least 1", "Nearest: 1.")
