"""Options of ``mtk verify``: those of pretrain, and how to check them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

from mtk.config.plan import (
    PlanDataConfig,
    PlanLengthConfig,
    PlanSaveConfig,
    without_open_schedule,
)
from mtk.config.pretrain import PretrainConfig
from mtk.config.schema import group, option
from mtk.config.world_rules import smallest_world
from mtk.errors import Problem

MOST_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """How a configuration is checked."""

    shrink: bool = option(
        False, help="Make the model as small as the layout allows; heads and experts stay."
    )
    steps: int | None = option(
        None, help="Training steps: of a layout, the last is compared [1]; of a resume, all [4]."
    )

    def problems(self) -> Iterator[Problem]:
        if self.steps is not None and self.steps < 1:
            yield Problem("steps", self.steps, "must be at least 1", "Nearest: 1.")


@dataclass(frozen=True, kw_only=True)
class MatrixConfig:
    """Which layouts ``--matrix`` runs through."""

    matrix: bool = option(
        False, help="Check every legal layout of tiny models instead of one configuration."
    )
    ranks: str = option("1-8", help="Numbers of ranks, e.g. 4 or 2-8; at most 8.")
    subset: Literal["all", "pairwise"] = option(
        "all", help="All layouts, or few that combine each two techniques at least once."
    )
    model: Literal["dense", "moe", "moe-biased", "hybrid", "bert", "t5", "both"] = option(
        "both", help="Which tiny model; both: dense and moe."
    )
    limit: int | None = option(None, help="A random choice (--seed) of so many of the layouts.")
    jobs: int = option(1, help="Layouts that are run at the same time.", runtime=True)
    output: str | None = option(
        None, help="JSON lines, one a layout; those that it says are equal are not run again."
    )

    @property
    def span(self) -> range:
        """The numbers of ranks, after the checks."""
        first, _, last = self.ranks.partition("-")
        return range(int(first), int(last or first) + 1)

    def problems(self) -> Iterator[Problem]:
        if not self.matrix:
            yield from self._unused()
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.ranks)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= MOST_RANKS:
            rule = f"must be a number or a range of them in 1-{MOST_RANKS}"
            yield Problem("ranks", self.ranks, rule, f"Nearest: 1-{MOST_RANKS}.")
        for name in ("limit", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")

    def _unused(self) -> Iterator[Problem]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                rule = "only means something with --matrix"
                yield Problem(field.name, value, rule, "Add --matrix, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class _VerifyConfig(PretrainConfig):
    """Pretrain's options without the need of data, a length or a folder."""

    data: PlanDataConfig = group(PlanDataConfig, title="Data")
    length: PlanLengthConfig = group(PlanLengthConfig, title="Length")
    checkpoint: PlanSaveConfig = group(PlanSaveConfig, title="Checkpoints")
    check: CheckConfig = group(CheckConfig, title="Verification")

    @property
    def world(self) -> int:
        """Ranks that are started: --nproc, or as few as hold the layout."""
        nproc = self.parallel.nproc
        return nproc if nproc > 1 else smallest_world(self.parallel)

    def problems(self) -> Iterator[Problem]:
        yield from without_open_schedule(super().problems(), self.length)

    def _layout_problems(self) -> Iterator[Problem]:
        yield from self.parallel.problems_with_world(
            self.model, self.batch, self.world, "parallel.nproc"
        )

    def derived(self) -> Self:
        parallel = dataclasses.replace(self.parallel, nproc=self.world)
        return dataclasses.replace(super().derived(), parallel=parallel)


@dataclass(frozen=True, kw_only=True)
class VerifyLayoutConfig(_VerifyConfig):
    """Everything ``mtk verify layout`` needs without ``--matrix``."""

    matrix: MatrixConfig = group(MatrixConfig, title="Matrix")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.world == 1:
            rule = "is the one process that layouts are compared with"
            yield Problem("parallel.nproc", 1, rule, "Give --nproc, --tp, --pp, --cp or --ep.")


@dataclass(frozen=True, kw_only=True)
class MatrixRuntimeConfig:
    """What the matrix takes of pretrain's options."""

    seed: int = option(1234, help="Seed of weights, tokens and --limit's choice.")


@dataclass(frozen=True, kw_only=True)
class VerifyMatrixConfig:
    """Everything ``mtk verify layout --matrix`` needs."""

    matrix: MatrixConfig = group(MatrixConfig, title="Matrix")
    runtime: MatrixRuntimeConfig = group(MatrixRuntimeConfig, title="Runtime")


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """Where ``mtk verify resume`` interrupts."""

    stop_at: int | None = option(
        None, help="Step of the checkpoint to continue from (default: half of --steps)."
    )


@dataclass(frozen=True, kw_only=True)
class VerifyResumeConfig(_VerifyConfig):
    """Everything ``mtk verify resume`` needs."""

    resume: ResumeConfig = group(ResumeConfig, title="Verification")

    @property
    def steps(self) -> int:
        return 4 if self.check.steps is None else self.check.steps

    @property
    def stop_at(self) -> int:
        return max(1, self.steps // 2) if self.resume.stop_at is None else self.resume.stop_at

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.steps < 2:
            yield Problem("check.steps", self.steps, "must be at least 2", "Nearest: 2.")
        elif not 1 <= self.stop_at < self.steps:
            rule = f"must lie in 1..{self.steps - 1}, before the last of {self.steps} steps"
            nearest = min(max(self.stop_at, 1), self.steps - 1)
            yield Problem("resume.stop_at", self.stop_at, rule, f"Nearest: {nearest}.")
