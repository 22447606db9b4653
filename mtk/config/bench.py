"""Options of ``mtk bench``: those of pretrain, and what to measure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mtk.config.plan import PlanLengthConfig, without_open_schedule
from mtk.config.pretrain import DataConfig, PretrainConfig, SaveConfig
from mtk.config.schema import group, option
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class BenchDataConfig(DataConfig):
    """As for pretrain, but mock data unless others are named."""

    mock_data: bool = option(True, help="Train on generated tokens; needs --vocab-size.")


@dataclass(frozen=True, kw_only=True)
class BenchSaveConfig(SaveConfig):
    """As for pretrain, but a benchmark saves nothing."""

    save: str = option("", help="Folder of checkpoints; not used by a benchmark.")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How often, and where the figures go."""

    warmup: int = option(3, help="Steps before the measured ones.", runtime=True)
    steps: int = option(8, help="Measured steps; their median counts.", runtime=True)
    repeats: int = option(1, help="Runs of everything, each in fresh ranks.", runtime=True)
    output: str | None = option(None, help="JSON file of all figures.", runtime=True)

    def problems(self) -> Iterator[Problem]:
        for name, least in (("warmup", 0), ("steps", 1), ("repeats", 1)):
            value = getattr(self, name)
            if value < least:
                yield Problem(name, value, f"must be at least {least}", f"Nearest: {least}.")

    @property
    def total(self) -> int:
        """Steps of one run."""
        return self.warmup + self.steps


@dataclass(frozen=True, kw_only=True)
class BenchConfig(PretrainConfig):
    """A training that is measured instead of finished; its length is that of the measurement."""

    data: BenchDataConfig = group(BenchDataConfig, title="Data")
    length: PlanLengthConfig = group(PlanLengthConfig, title="Length (of the schedule only)")
    checkpoint: BenchSaveConfig = group(BenchSaveConfig, title="Checkpoints")
    measure: MeasureConfig = group(MeasureConfig, title="Measurement")

    def problems(self) -> Iterator[Problem]:
        yield from without_open_schedule(super().problems(), self.length)


@dataclass(frozen=True, kw_only=True)
class LayoutsBenchConfig(BenchConfig):
    """Everything ``mtk bench layouts`` needs."""

    layout: tuple[str, ...] = option(
        (),
        help="Short names, e.g. tp2.sp-dp2.full or pp2.interleaved.c6, each with options of its "
        "own if needed: pp2.1f1b[micro_batch_size=1,compile=false]. One process comes first.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainBenchConfig(BenchConfig):
    """Everything ``mtk bench train`` needs."""

    plain: bool = option(True, help="Measure a plain PyTorch loop of the same model beside it.")
    roofline: bool = option(
        True, help="Time the step's matrix products and attention alone, as what is possible."
    )
    split_steps: int = option(
        5, help="Further steps whose parts are timed; the one of median length is shown."
    )
    profile_steps: int = option(
        3, help="Further steps under torch.profiler, for kinds of CUDA kernels; 0 is off."
    )
    chart: str | None = option(None, help="PNG file of speeds and of a step's parts.", runtime=True)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.profile_steps < 0:
            yield Problem(
                "profile_steps", self.profile_steps, "must not be negative", "Nearest: 0."
            )
        if self.split_steps < 1:
            yield Problem("split_steps", self.split_steps, "must be at least 1", "Nearest: 1.")
        if self.batch.rampup_batch_size is not None:
            rule = "changes the step that is measured"
            yield Problem("batch.rampup_batch_size", self.batch.rampup_batch_size, rule)
        if self.chart is not None and not self.chart.endswith(".png"):
            yield Problem("chart", self.chart, "must end in .png")


@dataclass(frozen=True, kw_only=True)
class RecomputeBenchConfig(BenchConfig):
    """Everything ``mtk bench recompute`` needs."""

    attention: tuple[str, ...] = option(
        ("auto", "math"),
        help="Attention kernels to measure under: auto (what --attention-backend says) and "
        "math, which keeps its scores.",
    )

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for name in self.attention:
            if name not in ("auto", "math"):
                yield Problem("attention", name, "must be auto or math", "Nearest: auto.")
        if self.world != 1:
            rule = "is measured on one device"
            yield Problem("parallel.nproc", self.parallel.nproc, rule, "Leave it out.")


@dataclass(frozen=True, kw_only=True)
class OptimizerMemoryConfig:
    """Everything ``mtk bench optimizer-memory`` needs."""

    ranks: tuple[int, ...] = option((1, 2, 4, 8), help="Numbers of data-parallel CPU ranks.")
    precisions: tuple[str, ...] = option(("fp32", "bf16", "fp16"), help="Formats to measure.")
    shardings: tuple[str, ...] = option(
        ("replicate", "optimizer", "full"), help="Modes of --data-parallel-sharding to measure."
    )
    num_layers: int = option(24, help="Layers of the model.")
    hidden_size: int = option(256, help="Width of the model.")
    output: str | None = option(None, help="JSON file of all figures.", runtime=True)

    def problems(self) -> Iterator[Problem]:
        known = {
            "precisions": ("fp32", "bf16", "fp16"),
            "shardings": ("replicate", "optimizer", "full"),
        }
        for name, legal in known.items():
            for value in getattr(self, name):
                if value not in legal:
                    yield Problem(name, value, f"must be one of {', '.join(legal)}")
        for count in self.ranks:
            if count < 1 or not math.log2(count).is_integer():
                yield Problem("ranks", count, "must be a power of 2", "Nearest: 2.")
        if self.num_layers < 1:
            yield Problem("num_layers", self.num_layers, "must be at least 1", "Nearest: 1.")
        if self.hidden_size < 64 or self.hidden_size % 64:
            rule = "must be a multiple of 64"
            yield Problem("hidden_size", self.hidden_size, rule, "Nearest: 64.")
