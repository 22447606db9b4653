"""Options of ``mtk convert``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem

TARGETS = ("target_tensor_parallel_size", "target_pipeline_parallel_size")
IMPLEMENTATION = {"target_transformer_impl": "transformer_engine"}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Everything ``mtk convert`` needs."""

    load: str = option(
        help="Checkpoint, or directory of Hugging Face or Megatron, to convert.", runtime=True
    )
    save: str = option(help="Folder to write.", runtime=True)
    to: Literal["native", "hf", "megatron"] = option(help="Format to write.")
    source: Literal["auto", "native", "hf", "megatron"] = option(
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

    target_tensor_parallel_size: int | None = option(
        None, help="Tensor-parallel ranks to write a Megatron checkpoint for (default: as read)."
    )
    target_pipeline_parallel_size: int | None = option(
        None, help="Pipeline-parallel ranks to write a Megatron checkpoint for (default: as read)."
    )
    target_transformer_impl: Literal["transformer_engine", "local"] = option(
        "transformer_engine",
        help="Which layers of Megatron will load it (its --transformer-impl): norms are named "
        "differently.",
    )
    true_vocab_size: int | None = option(
        None,
        help="Token ids of a Megatron checkpoint without its padding, if its files do not say.",
    )
    megatron_args: str | None = option(
        None,
        help="YAML file of Megatron arguments that a checkpoint lacks; null for one that mtk "
        "does not know and that does not change what the model computes.",
    )

    def problems(self) -> Iterator[Problem]:
        if not 0 < self.tolerance < float("inf"):
            rule = "must be greater than 0 and finite"
            yield Problem("tolerance", self.tolerance, rule, "Nearest: 1e-4.")
        if self.max_shard_size < 1:
            yield Problem("max_shard_size", self.max_shard_size, "must be at least 1")
        for name in (*TARGETS, "true_vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")
        if self.to != "megatron":
            for name, unset in {**dict.fromkeys(TARGETS), **IMPLEMENTATION}.items():
                if getattr(self, name) != unset:
                    rule = "only means something with to = megatron"
                    yield Problem(name, getattr(self, name), rule, "Leave it out.")
        if self.source in ("native", "hf"):
            yield from self.misplaced(f"from = {self.source}")
        if self.hf_family is not None and self.to != "hf":
            rule = "names a Hugging Face family, and none is written"
            yield Problem("hf_family", self.hf_family, rule, "Leave it out, or use --to hf.")
        if self.source == self.to != "megatron":
            rule = f"is the format that --from says {self.load} has already"
            yield Problem("to", self.to, rule)

    def misplaced(self, source: str) -> Iterator[Problem]:
        """What is said of a Megatron checkpoint where the ``source`` is none."""
        for name in ("true_vocab_size", "megatron_args"):
            if getattr(self, name) is not None:
                rule = f"says something of a Megatron checkpoint, not of {source}"
                yield Problem(name, getattr(self, name), rule, "Leave it out.")
