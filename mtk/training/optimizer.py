"""AdamW over main weights, with the weight-decay rule and clipping by global norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.config.optimization import OptimizerConfig
from mtk.errors import CheckpointError

_STATES = ("exp_avg", "exp_avg_sq")


def decays(name: str, weight: Tensor) -> bool:
    """Matrices and embeddings decay; vectors (norms) and everything called bias do not."""
    return weight.ndim > 1 and not name.endswith(".bias")


class Optimizer:
    """torch's fused AdamW with state addressed by parameter name."""

    def __init__(self, weights: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self._weights = dict(weights)
        self._clip = config.clip_grad
        decay = [w for name, w in self._weights.items() if decays(name, w)]
        plain = [w for name, w in self._weights.items() if not decays(name, w)]
        groups: list[dict[str, Any]] = [
            {"params": decay, "decays": True},
            {"params": plain, "decays": False},
        ]
        groups = [group for group in groups if group["params"]]
        self._adam: torch.optim.AdamW | None = None
        if groups:  # else all weights here are frozen
            self._adam = torch.optim.AdamW(
                groups,
                lr=config.lr,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_eps,
                weight_decay=config.weight_decay,
                fused=True,
            )

    def zero_grad(self) -> None:
        for weight in self._weights.values():
            weight.grad = None

    @torch.no_grad()
    def unscale(self, scale: float) -> None:
        """Divide gradients by the loss scale."""
        gradients = [w.grad for w in self._weights.values() if w.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, 1.0 / scale)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """L2 norm of all gradients on this rank (inf if not finite)."""
        gradients = [w.grad for w in self._weights.values() if w.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def clip_(self, norm: Tensor) -> None:
        """Scale all gradients by clip / (norm + 1e-6) when that is below one."""
        if self._clip > 0:
            coefficient = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            gradients = [w.grad for w in self._weights.values() if w.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient)

    def step(self, lr: float, weight_decay: float) -> None:
        """One update with this learning rate and this decay (for what decays)."""
        if self._adam is None:
            return
        for group in self._adam.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        self._adam.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts as ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``."""
        tensors: dict[str, Tensor] = {}
        known = {} if self._adam is None else self._adam.state
        for name, weight in self._weights.items():
            state = known.get(weight, {})
            for key in (*_STATES, "step"):
                if key in state:
                    tensors[f"{key}.{name}"] = state[key]
        return tensors

    def state_names(self) -> list[str]:
        """Names of all tensors of the state once a step was taken."""
        return [f"{key}.{name}" for name in self._weights for key in (*_STATES, "step")]

    def check_names(self, found: set[str], weights: Iterable[str]) -> None:
        """``found`` is the state of all ``weights`` of the model. Raises CheckpointError."""
        wanted = {f"{key}.{name}" for name in weights for key in (*_STATES, "step")}
        if found != wanted:
            raise CheckpointError(
                f"the checkpoint's optimizer state does not fit the model, e.g. "
                f"{sorted(found ^ wanted)[:5]}. Use --finetune to start with a fresh optimizer."
            )

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of :meth:`state_tensors`. Raises CheckpointError."""
        self.check_names(set(tensors), self._weights)
        for name, weight in self._weights.items():
            state: dict[str, Tensor] = {}
            for key in _STATES:
                state[key] = tensors[f"{key}.{name}"].to(weight.device, copy=True)
            device = weight.device if weight.is_cuda else "cpu"
            state["step"] = tensors[f"step.{name}"].to(device, copy=True)
            assert self._adam is not None
            self._adam.state[weight] = state
