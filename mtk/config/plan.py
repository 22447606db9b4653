"""Options of ``mtk plan``: those of pretrain, and the machine to plan for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mtk.config.pretrain import DataConfig, LengthConfig, PretrainConfig, SaveConfig
from mtk.config.schema import group, option
from mtk.config.world_rules import smallest_world
from mtk.errors import Problem


@dataclass(frozen=True)
class Gpu:
    """memory: bytes as sold; peak: dense FLOP/s in bf16 (V100: fp16) without sparsity."""

    memory: float
    peak: float


GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(141e9, 989.4e12),
    "h100": Gpu(80e9, 989.4e12),
    "b200": Gpu(180e9, 2250e12),
    "a100": Gpu(80e9, 312e12),
    "a100-40gb": Gpu(40e9, 312e12),
    "l40s": Gpu(48e9, 362e12),
    "v100": Gpu(32e9, 125e12),
}


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What the run would be started on."""

    gpus: int | None = option(None, help="Number of GPUs (default: as few as hold the layout).")
    gpu: Literal["h200", "h100", "b200", "a100", "a100-40gb", "l40s", "v100"] = option(
        "h100", help="Kind of GPU."
    )
    mfu: float = option(0.4, help="Share of the GPU's peak that the estimate assumes.")
    price_per_gpu_hour: float | None = option(None, help="For the cost, in any currency.")

    def problems(self) -> Iterator[Problem]:
        if self.gpus is not None and self.gpus < 1:
            yield Problem("gpus", self.gpus, "must be at least 1")
        if not 0 < self.mfu <= 1:
            yield Problem("mfu", self.mfu, "must be in (0, 1]", "Nearest: 0.4 is usual.")
        if self.price_per_gpu_hour is not None and self.price_per_gpu_hour < 0:
            yield Problem("price_per_gpu_hour", self.price_per_gpu_hour, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class PlanDataConfig(DataConfig):
    """As for pretrain, but a plan needs no data."""

    def problems(self) -> Iterator[Problem]:
        per_split = (self.train_data_path, self.valid_data_path, self.test_data_path)
        if self.data_path or any(per_split) or self.mock_data:
            yield from super().problems()


@dataclass(frozen=True, kw_only=True)
class PlanLengthConfig(LengthConfig):
    """As for pretrain, but a plan without a length costs a step."""

    def problems(self) -> Iterator[Problem]:
        if self.train_iters or self.train_samples or self.train_tokens:
            yield from super().problems()


def without_open_schedule(problems: Iterable[Problem], length: LengthConfig) -> Iterator[Problem]:
    """``problems`` but those of the schedule where there is no length: it is open then whether
    the schedule counts steps or samples."""
    endless = not any(vars(length).values())
    return (p for p in problems if not (endless and p.key.startswith("schedule.")))


@dataclass(frozen=True, kw_only=True)
class PlanSaveConfig(SaveConfig):
    """As for pretrain, but a plan saves nothing."""

    save: str = option("", help="Folder of checkpoints; not used by a plan.")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """Everything ``mtk plan`` needs."""

    data: PlanDataConfig = group(PlanDataConfig, title="Data")
    length: PlanLengthConfig = group(PlanLengthConfig, title="Length")
    checkpoint: PlanSaveConfig = group(PlanSaveConfig, title="Checkpoints")
    hardware: HardwareConfig = group(HardwareConfig, title="Hardware")

    @property
    def gpus(self) -> int:
        """GPUs to plan for: those given, else as few as hold the layout."""
        return self.hardware.gpus or smallest_world(self.parallel)

    @property
    def world(self) -> int:
        return self.gpus

    def problems(self) -> Iterator[Problem]:
        yield from without_open_schedule(super().problems(), self.length)

    def _layout_problems(self) -> Iterator[Problem]:
        yield from self.parallel.problems_with_world(
            self.model, self.batch, self.gpus, "hardware.gpus"
        )
