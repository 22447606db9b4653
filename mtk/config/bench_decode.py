"""Options of ``mtk bench decode``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class DecodeBenchConfig:
    """Everything ``mtk bench decode`` needs."""

    load: str = option(help="Native checkpoint, Hugging Face directory or quantized directory.")
    batch: tuple[int, ...] = option((1, 8), help="Sequences decoded together.")
    prompt_tokens: tuple[int, ...] = option((128,), help="Tokens of each prompt.")
    new_tokens: int = option(64, help="Tokens decoded after each prompt.")
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", help="Precision of the weights.")
    weights: Literal["stored", "int8", "fp8", "int4"] = option(
        "stored",
        help="stored: as --load has them; else rounded when opened, as mtk quantize does.",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="Where to run.", runtime=True)
    num_threads: int | None = option(
        None, help="CPU threads of torch (default: all cores).", runtime=True
    )
    repeats: int = option(3, help="Runs of each measurement; the median counts.", runtime=True)
    transformers: bool = option(
        True, help="Measure transformers' generate of the same model beside it."
    )
    compile_transformers: Literal["auto", "on", "off"] = option(
        "auto", help="Whether generate compiles its decoding; auto is on CUDA only."
    )
    speculation: Literal["off", "lookup"] = option(
        "off", help="Measure mtk with tokens guessed by prompt lookup beside it as well."
    )
    prompt_period: int | None = option(
        None,
        help="Prompts repeat so many random tokens, which a model that copies goes on with "
        "(default: random to the end).",
    )
    seed: int = option(1234, help="Seed of the prompts.")
    output: str | None = option(None, help="JSON file of all figures.", runtime=True)

    def problems(self) -> Iterator[Problem]:
        for name in ("batch", "prompt_tokens"):
            values = getattr(self, name)
            if not values:
                yield Problem(name, values, "measures nothing", "Leave it out for the default.")
            for value in values:
                if value < 1:
                    yield Problem(name, value, "must be at least 1", "Nearest: 1.")
        if self.new_tokens < 16:
            rule = "must be at least 16, of which the first ones are not timed"
            yield Problem("new_tokens", self.new_tokens, rule, "Nearest: 16.")
        for name in ("repeats", "num_threads", "prompt_period"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")
