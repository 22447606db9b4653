"""Initial weights that depend on the seed and each parameter's name only.

Every parameter has a generator of its own, so that any layout of ranks can make its
part of the same weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.generator import generator_of
from mtk.models.mamba_init import mamba_value

# Projections that write into the residual stream (Radford et al. 2019, section 2.3).
RESIDUAL_OUTPUTS = (
    "attention.output.weight",
    "mlp.down.weight",
    "mlp.experts.down",
    "mlp.shared.down.weight",
    "mamba.output.weight",
)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every parameter its :func:`initial_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Matrices ~ N(0, std), residual outputs ~ N(0, std / sqrt(branches)), norms such that they
    multiply by 1, biases 0; Mamba's own as :mod:`mtk.models.mamba_init` says. A layer has two
    branches, one of a pattern one. Of adapters A is as wide as the authors' uniform values, B 0.
    """
    if name.endswith(".lora.b"):
        return torch.zeros(shape)
    if name.endswith(".lora.a"):
        return normal_weight(name, shape, (3 * shape[1]) ** -0.5, seed)
    own = mamba_value(name, shape, config, seed) if ".mamba." in name else None
    if own is not None:
        return own
    if len(shape) == 1:
        norm = "norm" in name and name.endswith("weight") and not config.apply_layernorm_1p
        return torch.full(shape, 1.0 if norm else 0.0)
    std = config.init_method_std
    if name.endswith(RESIDUAL_OUTPUTS):
        branches = 2 if config.hybrid_layer_pattern is None else 1
        std /= (branches * config.num_layers) ** 0.5
    return normal_weight(name, shape, std, seed)


def normal_weight(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """The fp32 CPU tensor that parameter ``name`` starts from."""
    return torch.empty(shape).normal_(0.0, std, generator=generator_of(name, seed))


def made_ahead(tasks: Iterable[Callable[[], Tensor]], workers: int) -> Iterator[Tensor]:
    """The tensors of ``tasks`` in order, each made by one of ``workers`` threads while earlier
    ones are used; never more than ``workers`` + 1 of them exist unused. A random generator works
    on one core, and each parameter has its own."""
    if workers <= 1:
        yield from (task() for task in tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
