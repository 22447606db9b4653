"""Options of the flow ``curate_web`` as a whole."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from mtk.config.schema import option
from mtk.errors import Problem

CURATE_STEPS = ("urls", "clean", "duplicates", "decontaminate", "tokenizer", "preprocess")


@dataclass(frozen=True, kw_only=True)
class CurateFlowConfig:
    """Section ``flow`` of the flow's YAML file."""

    work: str = option("runs/curate_web", help="Folder for everything the flow makes.")
    input: tuple[str, ...] = option(help="The crawl: files or globs.")
    leave_out: tuple[str, ...] = option((), help=f"Steps not to run: {', '.join(CURATE_STEPS)}.")
    retries: int = option(2, help="Further attempts after an error that a retry can cure.")
    retry_delay: float = option(10.0, help="Seconds before a further attempt.")

    def problems(self) -> Iterator[Problem]:
        for name in self.leave_out:
            if name not in CURATE_STEPS:
                near = difflib.get_close_matches(name, CURATE_STEPS, n=1)
                fix = (
                    f"Did you mean {near[0]}?" if near else f"There are: {', '.join(CURATE_STEPS)}."
                )
                yield Problem("leave_out", name, "no such step", fix)
        if not self.input:
            yield Problem("input", self.input, "names no file")
        if self.retries < 0:
            yield Problem("retries", self.retries, "must not be negative", "Nearest: 0.")
        if self.retry_delay < 0:
            yield Problem("retry_delay", self.retry_delay, "must not be negative", "Nearest: 0.")
