"""Options of ``mtk quantize``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem

GROUPS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Everything ``mtk quantize`` needs."""

    load: str = option(
        help="Hugging Face directory, or checkpoint, of a Llama-like model.", runtime=True
    )
    save: str = option(help="Folder to write.", runtime=True)
    format: Literal["int8_wo", "fp8", "int4_wo"] = option(
        "int8_wo",
        help="Of weights; activations stay. int8_wo: INT8 with a scale for each output; fp8: e4m3, "
        "scaled alike; int4_wo: INT4 with a scale for each group of inputs of an output.",
    )
    group_size: int = option(128, help="Inputs that share a scale, with int4_wo.")
    dialect: Literal["modelopt", "compressed-tensors", "both"] = option(
        "modelopt",
        help="modelopt: for TensorRT-LLM; compressed-tensors: for vLLM and transformers; both: "
        "a folder for each inside --save.",
    )
    calibration_data: str | None = option(
        None, help="Dataset prefix whose tokens the gate is measured on.", runtime=True
    )
    valid_data: tuple[str, ...] = option(
        (), help="Text or JSONL files that the gate is measured on.", runtime=True
    )
    text_key: str = option("text", help="Field of a JSONL line that holds the text.")
    max_perplexity_increase: float = option(
        0.5, help="Refuse to publish above this many percent of perplexity."
    )
    gate_tokens: int = option(32_768, help="Tokens the gate looks at, at most.")
    dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, help="Precision of what is not quantised (default: as stored)."
    )
    max_shard_size: int = option(5_000_000_000, help="Bytes after which a new weight file begins.")

    def problems(self) -> Iterator[Problem]:
        if (self.calibration_data is None) == (not self.valid_data):
            rule = "the gate needs data: give exactly one of --calibration-data and --valid-data"
            yield Problem("calibration_data", self.calibration_data, rule)
        if not 0 <= self.max_perplexity_increase < float("inf"):
            found, rule = self.max_perplexity_increase, "must be at least 0 and finite"
            yield Problem("max_perplexity_increase", found, rule, "Nearest: 0.")
        if self.group_size not in GROUPS:
            nearest = min(GROUPS, key=lambda size: abs(size - self.group_size))
            rule = f"must be one of {', '.join(map(str, GROUPS))}, which kernels know"
            yield Problem("group_size", self.group_size, rule, f"Nearest: {nearest}.")
        if self.gate_tokens < 2:
            yield Problem("gate_tokens", self.gate_tokens, "must be at least 2", "Nearest: 2.")
        if self.max_shard_size < 1:
            yield Problem("max_shard_size", self.max_shard_size, "must be at least 1")
