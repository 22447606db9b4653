"""Options of ``mtk serve`` that concern one engine only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem

# What the package calls --dtype. fp32 is the option's default, and means as much as not said.
DTYPES = {"fp32": "auto", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class TensorRTConfig:
    """With ``--engine tensorrt-llm``."""

    tensor_parallel_size: int = option(1, help="GPUs that share each layer.", runtime=True)
    kv_cache_fraction: float = option(
        0.9, help="Share of the free GPU memory that keys and values get.", runtime=True
    )
    kv_cache_dtype: Literal["auto", "fp8"] = option(
        "auto", help="Format of keys and values; auto is the model's own.", runtime=True
    )

    def problems(self) -> Iterator[Problem]:
        if self.tensor_parallel_size < 1:
            fix = "Nearest: 1."
            yield Problem(
                "tensor_parallel_size", self.tensor_parallel_size, "must be at least 1", fix
            )
        if not 0 < self.kv_cache_fraction < 1:
            rule = "must lie between 0 and 1"
            yield Problem("kv_cache_fraction", self.kv_cache_fraction, rule, "Nearest: 0.9.")
