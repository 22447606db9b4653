"""AdamW over main weights, with the weight-decay rule and clipping by global norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mtk.config.optimization import OptimizerConfig
from mtk.errors import CheckpointError
from mtk.kernels import fused_on
from mtk.precision.main_weights import MainWeights
from mtk.training.adamw import MOMENTS, TorchUpdate, Update

_STATES = (*MOMENTS, "step")


def decays(name: str, weight: Tensor) -> bool:
    """Matrices and embeddings decay; vectors (norms) and everything called bias do not."""
    return weight.ndim > 1 and not name.endswith(".bias")


class Optimizer:
    """AdamW with state addressed by parameter name.

    fused: in one kernel of mtk's own, or by torch's AdamW, which must equal it; by default the
    former wherever it runs. State passes from one to the other through checkpoints.
    """

    def __init__(
        self, main: MainWeights, config: OptimizerConfig, *, fused: bool | None = None
    ) -> None:
        self._weights = main.weights
        self._clip = config.clip_grad
        self.fused = can_fuse(main.weights.values()) if fused is None else fused
        # Without weights all of those here are frozen.
        self._update = _update(main, config, self.fused) if main.weights else None

    def step(self, norm: Tensor, loss_scale: float, lr: float, weight_decay: float) -> None:
        """One update of the main weights and of the parameters that follow them.

        norm: of all gradients of the job, already without the loss scale; they are scaled by
        clip / (norm + 1e-6) where that is below one. weight_decay: for what decays. The
        gradients may be overwritten.
        """
        if self._update is not None:
            self._update.step(self._factor(norm, loss_scale), lr, weight_decay)

    def _factor(self, norm: Tensor, loss_scale: float) -> Tensor | None:
        """What gradients are to be multiplied by, an fp32 scalar on the device: the host does not
        know the norm, and must not wait for it. None for one."""
        if self._clip > 0:
            coefficient = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            return coefficient if loss_scale == 1.0 else coefficient / loss_scale
        return None if loss_scale == 1.0 else torch.full_like(norm, 1.0 / loss_scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts as ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``."""
        known = {} if self._update is None else self._update.state()
        return {
            f"{key}.{name}": known[name][key]
            for name in self._weights
            if name in known
            for key in _STATES
        }

    def state_names(self) -> list[str]:
        """Names of all tensors of the state once a step was taken."""
        return [f"{key}.{name}" for name in self._weights for key in _STATES]

    def check_names(self, found: set[str], weights: Iterable[str]) -> None:
        """``found`` is the state of all ``weights`` of the model. Raises CheckpointError."""
        wanted = {f"{key}.{name}" for name in weights for key in _STATES}
        if found != wanted:
            raise CheckpointError(
                f"the checkpoint's optimizer state does not fit the model, e.g. "
                f"{sorted(found ^ wanted)[:5]}. Use --finetune to start with a fresh optimizer."
            )

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over copies of the tensors of :meth:`state_tensors`. Raises CheckpointError."""
        self.check_names(set(tensors), self._weights)
        for name in self._weights:
            assert self._update is not None
            self._update.restore(name, {key: tensors[f"{key}.{name}"] for key in _STATES})


def can_fuse(weights: Iterable[Tensor]) -> bool:
    """Whether the kernel can move all of these main weights."""
    return all(fused_on(weight.device) and weight.is_contiguous() for weight in weights)


def _update(main: MainWeights, config: OptimizerConfig, fused: bool) -> Update:
    decay = {name for name, weight in main.weights.items() if decays(name, weight)}
    if not fused:
        return TorchUpdate(main, decay, config)
    # Imports Triton, which only CUDA builds of torch bring along.
    from mtk.training.fused_adamw import FusedUpdate

    return FusedUpdate(main, decay, config)
