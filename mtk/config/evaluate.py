"""Options of ``mtk evaluate``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mtk.config.heads import TASKS as HEADS
from mtk.config.schema import option
from mtk.config.world_rules import launch_problems
from mtk.errors import Problem

HARNESS = "lm-eval:"
TEXT_TASKS = ("WIKITEXT103", "LAMBADA")
TASKS = (*TEXT_TASKS, *HEADS)
# What belongs to some tasks only, with the value that leaves it out.
PERPLEXITY_OPTIONS = {"overlapping_eval": None, "windows": "megatron"}
OWN_OPTIONS = {"text_key": "text"}
TEXT_OPTIONS = {"prepend_bos": "auto"}
HARNESS_OPTIONS = {"lm_eval_tasks": None, "num_fewshot": None, "limit": None}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything ``mtk evaluate`` needs."""

    load: str = option(
        help="Checkpoint, Hugging Face directory or quantised directory.", runtime=True
    )
    task: str = option(
        help="WIKITEXT103: perplexity of any text, adjusted for the tokenizer; LAMBADA: last word; "
        "RACE, MNLI, QQP: accuracy of a BERT finetuned for it; lm-eval:NAME[,NAME]: tasks of "
        "lm-evaluation-harness."
    )
    valid_data: tuple[str, ...] = option(
        (),
        help="Files: text, or JSONL with one document a line; folders of RACE, .tsv files of MNLI "
        "and QQP. For one lm-eval task: the file that "
        "takes the place of its published data set.",
        runtime=True,
    )
    output: str = option(help="Folder for results.json and items.jsonl.", runtime=True)
    text_key: str = option("text", help="Field of a JSONL line that holds the text.")
    strict_lambada: bool = option(False, help="The label is the last word, not the last token.")
    overlapping_eval: int | None = option(
        None, help="Predictions newly scored in each window (default: windows do not overlap)."
    )
    windows: Literal["megatron", "rolling"] = option(
        "megatron",
        help="rolling: cut as lm-evaluation-harness does, with the first token predicted too.",
    )
    detokenizer: Literal["auto", "wikitext", "ptb", "none"] = option(
        "auto", help="Marks to undo before scoring; auto decides by the file's path."
    )
    prepend_bos: Literal["auto", "always", "never"] = option(
        "auto",
        help="BOS in front of every text; auto: where transformers puts it with this tokenizer.",
    )
    seq_length: int | None = option(
        None,
        help="Longest context in tokens (default: what the model takes at most; for WIKITEXT103 "
        "with Megatron's windows what it was trained at).",
    )
    lm_eval_tasks: str | None = option(
        None,
        help="Folder of task files (YAML) for lm-eval tasks; data files are named relative to it.",
        runtime=True,
    )
    num_fewshot: int | None = option(
        None, help="Examples in front of each question of an lm-eval task (default: the task's)."
    )
    limit: int | None = option(None, help="Only the first so many questions of an lm-eval task.")
    batch_tokens: int | None = option(
        None,
        help="Tokens in a forward pass, padding included (default: 16,384, unless --batch-size).",
        runtime=True,
    )
    batch_size: int | None = option(
        None, help="Sequences in a forward pass, at most.", runtime=True
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", help="Precision of the computation.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="Where to compute.", runtime=True)
    nproc: int = option(1, help="Local ranks that share the work.", runtime=True)
    distributed_timeout_minutes: float = option(
        60.0, help="How long ranks wait for one of them.", runtime=True
    )

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """Names of lm-evaluation-harness's tasks; none for a task of mtk's own."""
        names = self.task.removeprefix(HARNESS) if self.task.startswith(HARNESS) else ""
        return tuple(name.strip() for name in names.split(",") if name.strip())

    def problems(self) -> Iterator[Problem]:
        positive = ("overlapping_eval", "seq_length", "batch_size", "batch_tokens", "limit")
        for name in (*positive, "nproc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            yield Problem("num_fewshot", self.num_fewshot, "must be 0 or more", "Nearest: 0.")
        minutes = self.distributed_timeout_minutes
        if not 0 < minutes < math.inf:
            rule = "must be greater than 0 and finite"
            yield Problem("distributed_timeout_minutes", minutes, rule, "Nearest: 60 is usual.")
        length, overlap = self.seq_length, self.overlapping_eval
        if overlap is not None and length is not None and overlap > length:
            rule = f"exceeds seq_length = {length}: tokens in between would not be scored"
            yield Problem("overlapping_eval", overlap, rule, f"Nearest: {length}.")
        if overlap is not None and self.windows == "rolling":
            rule = "belongs to --windows megatron; rolling windows have an overlap of their own"
            yield Problem("overlapping_eval", overlap, rule, "Leave it out.")
        for problem in launch_problems(self.nproc):
            yield Problem("nproc", problem.found, problem.rule, problem.fix)
        yield from self._task_problems()

    def _task_problems(self) -> Iterator[Problem]:
        harness = self.task.startswith(HARNESS)
        if not harness and self.task not in TASKS:
            near = difflib.get_close_matches(self.task.upper(), TASKS, n=1)
            fix = f"Nearest: {near[0]}." if near else f"For the harness's: {HARNESS}{self.task}."
            yield Problem("task", self.task, f"must be {', '.join(TASKS)} or {HARNESS}NAME", fix)
            return
        if harness and not self.harness_tasks:
            rule = "names no task of lm-evaluation-harness"
            yield Problem("task", self.task, rule, f"For example {HARNESS}hellaswag.")
        if not harness and not self.valid_data:
            yield Problem("valid_data", self.valid_data, "names no file")
        if len(self.harness_tasks) > 1 and self.valid_data:
            rule = "takes the place of one task's data, but several tasks are asked for"
            yield Problem("valid_data", self.valid_data, rule, "Evaluate them apart.")
        if self.strict_lambada and self.task != "LAMBADA":
            yield Problem("strict_lambada", True, "belongs to --task LAMBADA", "Leave it out.")
        if self.task != "WIKITEXT103":
            yield from self._foreign(PERPLEXITY_OPTIONS, "--task WIKITEXT103")
            allowed = ("auto",) if harness else ("auto", "none")
            if self.detokenizer not in allowed:
                rule = "belongs to --task WIKITEXT103"
                yield Problem("detokenizer", self.detokenizer, rule, f"Nearest: {allowed[-1]}.")
        if self.task in HEADS:
            yield from self._foreign(TEXT_OPTIONS, "tasks of plain text")
        if harness or self.task in HEADS:
            yield from self._foreign(OWN_OPTIONS, f"--task {' or '.join(TEXT_TASKS)}")
        if not harness:
            yield from self._foreign(HARNESS_OPTIONS, f"--task {HARNESS}NAME")

    def _foreign(self, options: Mapping[str, str | None], owner: str) -> Iterator[Problem]:
        for name, left_out in options.items():
            if getattr(self, name) != left_out:
                yield Problem(name, getattr(self, name), f"belongs to {owner}", "Leave it out.")
