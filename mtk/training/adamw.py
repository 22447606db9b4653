"""An AdamW update (Loshchilov and Hutter 2019) of main weights, by torch's optimizer.

``mtk.training.fused_adamw`` does the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mtk.config.optimization import OptimizerConfig
from mtk.precision.main_weights import MainWeights

MOMENTS = ("exp_avg", "exp_avg_sq")


class Update(Protocol):
    """Moves fp32 main weights and their moments by gradients of any type, and rounds them into the
    parameters that the model computes with.

    step: gradients count times ``factor`` (fp32 scalar on the device, None: 1); weight_decay is
    for what decays. Weights without a gradient stay. state: of each weight that was ever moved, its
    moments and ``step``, an fp32 scalar, on its device. restore: of one weight, copied.
    """

    def step(self, factor: Tensor | None, lr: float, weight_decay: float) -> None: ...
    def state(self) -> Mapping[str, Mapping[str, Tensor]]: ...
    def restore(self, name: str, state: Mapping[str, Tensor]) -> None: ...


class TorchUpdate:
    """torch's fused AdamW, with a pass of its own over the gradients for each thing that comes
    before it: widening, scaling. Runs everywhere."""

    def __init__(self, main: MainWeights, decay: Collection[str], config: OptimizerConfig) -> None:
        self._main = main
        split: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, weight in main.weights.items():
            split[name in decay].append(weight)
        groups: list[dict[str, Any]] = [
            {"params": weights, "decays": which} for which, weights in split.items() if weights
        ]
        self._adam = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self, factor: Tensor | None, lr: float, weight_decay: float) -> None:
        weights, gradients = self._main.weights, self._main.gradients
        for name, gradient in gradients.items():
            # One after the other, each in place of the narrow one.
            gradients[name] = None if gradient is None else gradient.float()
        present = [gradient for gradient in gradients.values() if gradient is not None]
        if factor is not None and present:
            torch._foreach_mul_(present, factor)
        for group in self._adam.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        for name, weight in weights.items():
            weight.grad = gradients[name]
        self._adam.step()
        for weight in weights.values():
            weight.grad = None
        self._main.publish()

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        known = self._adam.state
        return {name: known[w] for name, w in self._main.weights.items() if w in known}

    @torch.no_grad()
    def restore(self, name: str, state: Mapping[str, Tensor]) -> None:
        weight = self._main.weights[name]
        devices = dict.fromkeys(MOMENTS, weight.device)
        devices["step"] = weight.device if weight.is_cuda else torch.device("cpu")
        self._adam.state[weight] = {
            key: tensor.to(devices[key], copy=True) for key, tensor in state.items()
        }
