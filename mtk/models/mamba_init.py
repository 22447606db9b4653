"""Initial values of Mamba layers (Gu & Dao 2023, section 3.6), by name and seed alone.

Convolutions as torch draws them, biases zero; decay rates uniform in ``mamba_a_range``; step
sizes log-uniform in ``mamba_dt_range``, so that heads begin with memories of different
lengths; all of x skips to the output. The gated norm's weights are never zero-centred.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.models.generator import generator_of


def mamba_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor | None:
    """fp32 on the CPU; None for parameters that start like any others."""
    part = name.rpartition(".mamba.")[2]
    if part in ("skip", "norm.weight"):
        return torch.ones(shape)
    if part == "a_log":
        return _uniform(name, shape, *config.mamba_a_range, seed).log()
    if part == "dt_bias":
        low, high = (math.log(size) for size in config.mamba_dt_range)
        dt = _uniform(name, shape, low, high, seed).exp().clamp(min=config.mamba_dt_floor)
        # softplus of this is dt again.
        return dt + (-torch.expm1(-dt)).log()
    if part.startswith("conv_") and part.endswith(".weight"):
        bound = 1 / math.sqrt(shape[1])
        return _uniform(name, shape, -bound, bound, seed)
    return None


def _uniform(name: str, shape: tuple[int, ...], low: float, high: float, seed: int) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=generator_of(name, seed))
