"""Options of ``mtk curate urls | clean | duplicates | decontaminate | web``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.curate_rules import (
    CleanRules,
    DecontaminationRules,
    DuplicateRules,
    RecordOptions,
    TextOptions,
    UrlRules,
)
from mtk.config.preprocess import ends_in_name
from mtk.config.schema import group, option
from mtk.errors import Problem

RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BARE_URLS = (".txt", ".txt.gz", ".txt.zst")
WEB_STEPS = ("urls", "clean", "duplicates", "decontaminate")
_INPUT = "Files or globs: .jsonl .json .txt, each also .gz or .zst, and .parquet."


def _without(path: str, suffixes: tuple[str, ...]) -> str:
    """The prefix that everything of an output is named after."""
    found = next((s for s in sorted(suffixes, key=len, reverse=True) if path.endswith(s)), "")
    return path.removesuffix(found)


def _output_problems(output: str, suffixes: tuple[str, ...]) -> Iterator[Problem]:
    prefix = _without(output, suffixes)
    if prefix == output or not ends_in_name(prefix):
        name = output.rstrip("/.") or "corpus"
        rule = f"must be a file name ending in {', '.join(suffixes)}"
        yield Problem("output", output, rule, f"Nearest: {name}{suffixes[0]}.")


@dataclass(frozen=True, kw_only=True)
class CurateUrlsConfig:
    """Everything ``mtk curate urls`` needs."""

    input: tuple[str, ...] = option(help=f"{_INPUT} In .txt a URL a line.")
    output: str = option(
        help="Where to write: P.jsonl, or P.txt for bare URLs; each also .gz or .zst."
    )
    records: RecordOptions = group(RecordOptions, title="Records")
    urls: UrlRules = group(UrlRules, title="URLs")

    @property
    def prefix(self) -> str:
        return _without(self.output, RECORDS + BARE_URLS)

    def problems(self) -> Iterator[Problem]:
        if not self.input:
            yield Problem("input", self.input, "names no file")
        yield from _output_problems(self.output, RECORDS + BARE_URLS)


@dataclass(frozen=True, kw_only=True)
class _TextStep:
    """What the steps that look at texts share."""

    input: tuple[str, ...] = option(help=_INPUT)
    output: str = option(help="Where to write: P.jsonl, P.jsonl.gz or P.jsonl.zst.")
    text: TextOptions = group(TextOptions, title="Texts")
    records: RecordOptions = group(RecordOptions, title="Records")

    @property
    def prefix(self) -> str:
        return _without(self.output, RECORDS)

    def problems(self) -> Iterator[Problem]:
        if not self.input:
            yield Problem("input", self.input, "names no file")
        yield from _output_problems(self.output, RECORDS)


@dataclass(frozen=True, kw_only=True)
class CurateCleanConfig(_TextStep):
    """Everything ``mtk curate clean`` needs."""

    clean: CleanRules = group(CleanRules, title="Cleaning")


@dataclass(frozen=True, kw_only=True)
class CurateDuplicatesConfig(_TextStep):
    """Everything ``mtk curate duplicates`` needs."""

    duplicates: DuplicateRules = group(DuplicateRules, title="Duplicates")


@dataclass(frozen=True, kw_only=True)
class CurateDecontaminateConfig(_TextStep):
    """Everything ``mtk curate decontaminate`` needs."""

    decontamination: DecontaminationRules = group(DecontaminationRules, title="Decontamination")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.decontamination.names_files:
            yield needs_evaluation_sets("--evaluation-lambada, -race, -text or -jsonl")


def needs_evaluation_sets(fix: str) -> Problem:
    rule = "no evaluation set is given, so there is nothing to look for"
    return Problem("decontamination.evaluation_jsonl", (), rule, f"Give {fix}.")


@dataclass(frozen=True, kw_only=True)
class CurateWebConfig(_TextStep):
    """Everything ``mtk curate web`` needs."""

    leave_out: tuple[Literal["urls", "clean", "duplicates", "decontaminate"], ...] = option(
        (), help=f"Steps not to run: {', '.join(WEB_STEPS)}."
    )
    keep_steps: bool = option(
        False, help="Keep what each step wrote, in P.steps/; else it goes when all are done."
    )
    urls: UrlRules = group(UrlRules, title="URLs")
    clean: CleanRules = group(CleanRules, title="Cleaning")
    duplicates: DuplicateRules = group(DuplicateRules, title="Duplicates")
    decontamination: DecontaminationRules = group(DecontaminationRules, title="Decontamination")

    @property
    def steps(self) -> tuple[str, ...]:
        """What is run, in order."""
        return tuple(step for step in WEB_STEPS if step not in self.leave_out)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.steps:
            yield Problem("leave_out", self.leave_out, "leaves no step to run")
        if "decontaminate" in self.steps and not self.decontamination.names_files:
            yield needs_evaluation_sets(
                "--evaluation-lambada, -race, -text or -jsonl, or --leave-out decontaminate"
            )

    def step(self, name: str, source: tuple[str, ...], output: str) -> object:
        """The configuration of one step."""
        shared = {"input": source, "output": output, "records": self.records}
        if name == "urls":
            return CurateUrlsConfig(**shared, urls=self.urls)  # type: ignore[arg-type]
        # Only the first step sees the user's files; the steps write JSON lines.
        texts = (
            self.text
            if source == self.input
            else dataclasses.replace(self.text, text_documents="file")
        )
        shared["text"] = texts
        if name == "clean":
            return CurateCleanConfig(**shared, clean=self.clean)  # type: ignore[arg-type]
        if name == "duplicates":
            return CurateDuplicatesConfig(**shared, duplicates=self.duplicates)  # type: ignore[arg-type]
        return CurateDecontaminateConfig(**shared, decontamination=self.decontamination)  # type: ignore[arg-type]
