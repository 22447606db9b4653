"""Initial weights that depend on the seed and each parameter's name only.

Every parameter has a generator of its own, so that any layout of ranks can make its
part of the same weights.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from mtk.config.model import ModelConfig

# Projections that write into the residual stream (Radford et al. 2019, section 2.3).
RESIDUAL_OUTPUTS = (
    "attention.output.weight",
    "mlp.down.weight",
    "mlp.experts.down",
    "mlp.shared.down.weight",
)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every parameter its :func:`initial_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Matrices ~ N(0, std), residual outputs ~ N(0, std / sqrt(2 layers)), norms 1, biases 0."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    std = config.init_method_std
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= (2 * config.num_layers) ** 0.5
    return normal_weight(name, shape, std, seed)


def normal_weight(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """The fp32 CPU tensor that parameter ``name`` starts from."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
