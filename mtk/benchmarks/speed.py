"""How fast steps are, in tokens and as a share of what the hardware could do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtk.benchmarks.record import gpus, known_gpu
from mtk.config.pretrain import PretrainConfig
from mtk.launch.local import launch
from mtk.log import Reporter
from mtk.models.count import Flops
from mtk.models.count_families import flops_per_token


@dataclass(frozen=True)
class Speed:
    """tokens_per_second: of the whole job. flops_per_gpu: FLOP/s of each device, by both ways
    to count attention. mfu: their share of the GPU's dense bf16 peak; None where that is not
    known."""

    tokens_per_second: float
    flops_per_gpu: Flops
    mfu: Flops | None


def speed_of(
    config: PretrainConfig, seconds: float, ranks: int, hardware: Sequence[dict[str, Any]]
) -> Speed:
    """Of steps that take ``seconds`` each, on ``ranks`` devices."""
    rate = config.batch.full * config.model.seq_length / seconds
    per_token = flops_per_token(config.model)
    each = Flops(per_token.full * rate / ranks, per_token.causal * rate / ranks)
    known = known_gpu(hardware[0]["name"]) if hardware else None
    mfu = Flops(each.full / known.peak, each.causal / known.peak) if known else None
    return Speed(rate, each, mfu)


def slowest(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Of each step over all ranks, from the steps of each rank: that is the job's time."""
    return [max(step) for step in zip(*seconds, strict=True)]


def hardware_of(device: str, ranks: int, reporter: Reporter) -> list[dict[str, Any]]:
    """The GPUs that ``ranks`` ranks can use, asked in a process of their own; none on the CPU."""
    if device != "cuda":
        return []
    import torch

    count = min(ranks, torch.cuda.device_count())
    found: list[dict[str, Any]] = launch(gpus, (count,), device="cuda")
    for index, gpu in enumerate(found):
        rate = gpu["gemm_flops"] / 1e12
        reporter.info(f"GPU {index}: {gpu['name']}, bf16 GEMM 8192^3 {rate:.0f} TFLOP/s")
    return found
