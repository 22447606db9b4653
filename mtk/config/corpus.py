"""Options of ``mtk corpus demo``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mtk.config.preprocess import ends_in_name
from mtk.config.schema import option
from mtk.errors import Problem

SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class DemoCorpusConfig:
    """Everything ``mtk corpus demo`` needs."""

    output: str = option(help="The corpus P.jsonl; what else is asked for is named P.… too.")
    heldout: bool = option(
        False, help="Leave about 4 % of the documents out and write them to P.heldout.txt."
    )
    cloze: bool = option(
        False,
        help="Write last-word passages in LAMBADA's schema from the documents held out to "
        "P.cloze.jsonl (implies --heldout).",
    )

    @property
    def prefix(self) -> str:
        return self.output.removesuffix(SUFFIX)

    def problems(self) -> Iterator[Problem]:
        if not self.output.endswith(SUFFIX) or not ends_in_name(self.prefix):
            nearest = f"Nearest: {self.prefix.rstrip('/.') or 'corpus'}{SUFFIX}."
            yield Problem("output", self.output, f"must be a file name ending in {SUFFIX}", nearest)

    def derived(self) -> DemoCorpusConfig:
        return dataclasses.replace(self, heldout=self.heldout or self.cloze)
