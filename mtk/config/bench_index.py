"""Options of ``mtk bench index``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class IndexBenchConfig:
    """Everything ``mtk bench index`` needs."""

    samples: int = option(100_000_000, help="Samples to index, at least.")
    documents: int = option(1_000_000, help="Documents that they are made of.")
    epochs: int = option(1, help="Epochs that the samples come from, at least.")
    seq_length: int = option(1024, help="Tokens of a sample.")
    data_order: Literal["epochs", "megatron"] = option("epochs", help="As for mtk pretrain.")
    compiled: bool = option(True, help="Shuffle with numba where it is installed.")
    cache_folder: str | None = option(
        None, help="Also keep the arrays there, and open them again.", runtime=True
    )
    output: str | None = option(None, help="JSON file of all figures.", runtime=True)

    def problems(self) -> Iterator[Problem]:
        for name in ("samples", "documents", "epochs", "seq_length"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1", "Nearest: 1.")
        longest = 2 * self.samples * self.seq_length // max(1, self.documents * self.epochs)
        if longest >= 2**31:
            least = 2 * self.samples * self.seq_length // (2**31 * max(1, self.epochs)) + 1
            rule = "gives documents of more than 2^31 tokens"
            yield Problem("documents", self.documents, rule, f"Nearest: {least}.")
