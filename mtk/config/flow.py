"""Options of a flow: what holds for the chain as a whole, and for its last step."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem

OPTIONAL_STEPS = ("finetune", "evaluate", "cloze", "convert", "quantize", "serve")
SOURCES = {"hf_model": "convert", "quantized_model": "quantize", "checkpoint": "pretrain"}


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Section ``flow`` of a flow's YAML file."""

    work: str = option("runs/end_to_end", help="Folder for everything the flow makes.")
    input: tuple[str, ...] = option(
        (), help="Corpus files of your own (default: the demo corpus is built)."
    )
    heldout: tuple[str, ...] = option(
        (), help="Text that is not in --input, for evaluation and the quality gate."
    )
    cloze: tuple[str, ...] = option(
        (), help="Last-word passages in LAMBADA's schema (default: none with --input)."
    )
    leave_out: tuple[str, ...] = option((), help=f"Steps not to run: {', '.join(OPTIONAL_STEPS)}.")
    retries: int = option(2, help="Further attempts after an error that a retry can cure.")
    retry_delay: float = option(10.0, help="Seconds before a further attempt.")

    def problems(self) -> Iterator[Problem]:
        for name in self.leave_out:
            if name not in OPTIONAL_STEPS:
                near = difflib.get_close_matches(name, OPTIONAL_STEPS, n=1)
                fix = f"Did you mean {near[0]}?" if near else "The other steps build on it."
                rule = f"only {', '.join(OPTIONAL_STEPS)} can be left out"
                yield Problem("leave_out", name, rule, fix)
        yield from self._own_corpus()
        if self.retries < 0:
            yield Problem("retries", self.retries, "must not be negative", "Nearest: 0.")
        if self.retry_delay < 0:
            yield Problem("retry_delay", self.retry_delay, "must not be negative", "Nearest: 0.")

    def _own_corpus(self) -> Iterator[Problem]:
        if not self.input and (self.heldout or self.cloze):
            rule = "belongs to flow.input; the demo corpus brings its own"
            yield Problem("heldout", self.heldout or self.cloze, rule, "Leave it out.")
        needing = [name for name in ("evaluate", "quantize") if name not in self.leave_out]
        if self.input and not self.heldout and needing:
            rule = f"is needed by {' and '.join(needing)} with an input of your own"
            fix = "Give files of text that are not in flow.input, or leave those steps out."
            yield Problem("heldout", self.heldout, rule, fix)


@dataclass(frozen=True, kw_only=True)
class ServeCheckConfig:
    """Section ``check`` of a flow's YAML file: how the flow proves that its model answers."""

    source: Literal["hf_model", "quantized_model", "checkpoint"] = option(
        "hf_model", help="Which of the flow's models is served."
    )
    prompt: str = option("Hello world", help="Prompt of the request.")
    tokens_to_generate: int = option(1, help="Tokens the request asks for.")
    sample_prompt: str = option("Return the", help="Prompt of a second, longer answer.")
    sample_tokens: int = option(24, help="Tokens of the second answer; 0 leaves it out.")
    ready_timeout: float = option(120.0, help="Seconds the server may take to become ready.")

    def problems(self) -> Iterator[Problem]:
        if self.tokens_to_generate < 1:
            yield Problem("tokens_to_generate", self.tokens_to_generate, "must be at least 1")
        if self.sample_tokens < 0:
            yield Problem("sample_tokens", self.sample_tokens, "must not be negative")
        if not self.ready_timeout > 0:
            yield Problem("ready_timeout", self.ready_timeout, "must be greater than 0")
