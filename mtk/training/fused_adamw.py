"""An AdamW update in one kernel, as :class:`mtk.training.adamw.TorchUpdate` does it in many.

A gradient is read once, in the type in which it came, and scaled on the way; the rounded
parameter is written while its main weight is at hand. Needs Triton.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mtk.config.optimization import OptimizerConfig
from mtk.kernels.adamw import AdamW, Moved, Types
from mtk.precision.main_weights import MainWeights
from mtk.training.adamw import MOMENTS


class FusedUpdate:
    """One launch for all weights whose gradients, and whose parameters, are of the same types."""

    def __init__(self, main: MainWeights, decay: Collection[str], config: OptimizerConfig) -> None:
        self._main, self._decay = main, frozenset(decay)
        self._parameters = dict(main.rounded())
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        # Known to the host, which works the bias corrections out in fp64.
        self._counts: dict[str, int] = {}
        self._kernel = AdamW((config.adam_beta1, config.adam_beta2), config.adam_eps)

    @torch.no_grad()
    def step(self, factor: Tensor | None, lr: float, weight_decay: float) -> None:
        alike: dict[tuple[int, Types], list[Moved]] = defaultdict(list)
        for name, gradient in self._main.gradients.items():
            if gradient is None:
                continue
            count = self._counts[name] = self._counts.get(name, 0) + 1
            moved = self._moved(name, gradient)
            if gradient.numel():  # a rank may have no rows of a small weight
                alike[count, moved.types].append(moved)
        for (count, _), group in alike.items():
            self._kernel.step(group, count, factor, lr, weight_decay)

    def _moved(self, name: str, gradient: Tensor) -> Moved:
        weight = self._main.weights[name]
        if name not in self._moments:
            self._moments[name] = (torch.zeros_like(weight), torch.zeros_like(weight))
        return Moved(
            weight.detach(),
            gradient.contiguous(),
            *self._moments[name],
            self._parameters.get(name),
            name in self._decay,
        )

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, moments in self._moments.items():
            count = torch.full((), float(self._counts[name]), device=moments[0].device)
            found[name] = {**dict(zip(MOMENTS, moments, strict=True)), "step": count}
        return found

    @torch.no_grad()
    def restore(self, name: str, state: Mapping[str, Tensor]) -> None:
        device = self._main.weights[name].device
        first, second = (state[key].to(device, copy=True).contiguous() for key in MOMENTS)
        self._moments[name] = (first, second)
        self._counts[name] = int(state["step"].item())
