"""Options of ``mtk evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything ``mtk evaluate`` needs."""

    load: str = option(
        help="Checkpoint, Hugging Face directory or quantised directory.", runtime=True
    )
    task: Literal["WIKITEXT103", "LAMBADA"] = option(
        help="WIKITEXT103: perplexity of any text, adjusted for the tokenizer; LAMBADA: last word."
    )
    valid_data: tuple[str, ...] = option(
        help="Files: text, or JSONL with one document a line.", runtime=True
    )
    output: str = option(help="Folder for results.json and items.jsonl.", runtime=True)
    text_key: str = option("text", help="Field of a JSONL line that holds the text.")
    strict_lambada: bool = option(False, help="The label is the last word, not the last token.")
    overlapping_eval: int | None = option(
        None, help="Predictions newly scored in each window (default: windows do not overlap)."
    )
    detokenizer: Literal["auto", "wikitext", "ptb", "none"] = option(
        "auto", help="Marks to undo before scoring; auto decides by the file's path."
    )
    seq_length: int | None = option(
        None,
        help="Longest context in tokens (default: what the model was trained at; for LAMBADA what "
        "it takes at most).",
    )
    batch_size: int | None = option(
        None, help="Sequences in a forward pass (default: 16,384 tokens).", runtime=True
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", help="Precision of the computation.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="Where to compute.", runtime=True)

    def problems(self) -> Iterator[Problem]:
        for name in ("overlapping_eval", "seq_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")
        if not self.valid_data:
            yield Problem("valid_data", self.valid_data, "names no file")
        length, overlap = self.seq_length, self.overlapping_eval
        if overlap is not None and length is not None and overlap > length:
            rule = f"exceeds seq_length = {length}: tokens in between would not be scored"
            yield Problem("overlapping_eval", overlap, rule, f"Nearest: {length}.")
        if self.task == "WIKITEXT103" and self.strict_lambada:
            yield Problem("strict_lambada", True, "belongs to --task LAMBADA", "Leave it out.")
        if self.task == "LAMBADA":
            if overlap is not None:
                rule = "belongs to --task WIKITEXT103"
                yield Problem("overlapping_eval", overlap, rule, "Leave it out.")
            if self.detokenizer not in ("auto", "none"):
                rule = "belongs to --task WIKITEXT103: LAMBADA is ordinary text"
                yield Problem("detokenizer", self.detokenizer, rule, "Nearest: none.")
