"""Options of ``mtk bench preprocess``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from mtk.config.schema import group, option
from mtk.config.tokenizer import TokenizerConfig
from mtk.errors import Problem

# One row each; in the order of the table.
WAYS: dict[str, str] = {
    "mtk": "mtk preprocess, one worker",
    "mtk-workers": "mtk preprocess, several workers",
    "mtk-reference": "mtk preprocess, one worker, the tokenizer itself",
    "engine": "the engine alone, texts in memory",
    "loop": "a loop over tokenizers, texts in memory",
    "datatrove": "datatrove's DocumentTokenizer",
    "megatron": "Megatron's algorithm, one worker",
    "mtk-split": "mtk preprocess --split-sentences, one worker",
    "megatron-split": "Megatron's algorithm with --split-sentences",
}
USUAL = tuple(way for way in WAYS if not way.endswith("-split"))


@dataclass(frozen=True, kw_only=True)
class PreprocessBenchConfig:
    """Everything ``mtk bench preprocess`` needs."""

    input: str = option(help="A .jsonl file; its first megabytes are used.")
    json_key: str = option("text", help="Field of a record that holds the text.")
    ways: tuple[str, ...] = option(USUAL, help=f"What to measure: {', '.join(WAYS)}.")
    megabytes: int = option(200, help="Input of mtk and of the engine, in MB of the file.")
    plain_megabytes: int = option(20, help="Input of the slow ways, in MB of the file.")
    workers: int | None = option(
        None, help="Processes of mtk-workers (default: one a core).", runtime=True
    )
    repeats: int = option(1, help="Runs of everything; the fastest counts.", runtime=True)
    output: str | None = option(None, help="JSON file of all figures.", runtime=True)
    tokenizer: TokenizerConfig = group(TokenizerConfig, title="Tokenizer")

    def problems(self) -> Iterator[Problem]:
        for way in self.ways:
            if way not in WAYS:
                near = difflib.get_close_matches(way, WAYS, n=1)
                fix = f"Nearest: {near[0]}." if near else ""
                yield Problem("ways", way, f"must be one of {', '.join(WAYS)}", fix)
        if not self.input.endswith(".jsonl"):
            yield Problem("input", self.input, "must end in .jsonl")
        for name in ("megabytes", "plain_megabytes", "repeats"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1", "Nearest: 1.")
        if self.workers is not None and self.workers < 1:
            yield Problem("workers", self.workers, "must be at least 1", "Nearest: 1.")
