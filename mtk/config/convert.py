"""Options of ``mtk convert``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Everything ``mtk convert`` needs."""

    load: str = option(help="Checkpoint or Hugging Face directory to convert.", runtime=True)
    save: str = option(help="Folder to write.", runtime=True)
    to: Literal["native", "hf"] = option(help="Format to write.")
    source: Literal["auto", "native", "hf"] = option(
        "auto", help="What --load must be; auto takes what is there.", aliases=("--from",)
    )
    hf_family: str | None = option(
        None,
        help="model_type to write where several can express the model, e.g. mistral (default: "
        "the first that can).",
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, help="Precision of the written weights (default: as stored)."
    )
    tolerance: float = option(1e-4, help="Largest logit error between the two models, in fp32.")
    reference: Literal["auto", "transformers", "plain"] = option(
        "auto",
        help="What the Hugging Face files are checked with: transformers where it is installed, "
        "or mtk's own plain forward.",
    )
    max_shard_size: int = option(5_000_000_000, help="Bytes after which a new weight file begins.")

    def problems(self) -> Iterator[Problem]:
        if not 0 < self.tolerance < float("inf"):
            rule = "must be greater than 0 and finite"
            yield Problem("tolerance", self.tolerance, rule, "Nearest: 1e-4.")
        if self.max_shard_size < 1:
            yield Problem("max_shard_size", self.max_shard_size, "must be at least 1")
        if self.hf_family is not None and self.to != "hf":
            rule = "names a Hugging Face family, and none is written"
            yield Problem("hf_family", self.hf_family, rule, "Leave it out, or use --to hf.")
        if self.source == self.to:
            rule = f"is the format that --from says {self.load} has already"
            yield Problem("to", self.to, rule)
