"""fp32 main weights beside parameters of lower precision.

The optimizer and checkpoints see the main weights only. For fp32 training they are the
parameters themselves and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class MainWeights:
    """Main weights by name; ``model`` computes in ``dtype`` afterwards.

    Construct it while the model still has its fp32 initial weights, so that the main
    weights start unrounded. Buffers (rotary tables) stay fp32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._parameters = dict(model.named_parameters())
        self.weights: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if dtype == torch.float32:
                self.weights[name] = parameter
            else:
                self.weights[name] = parameter.detach().clone().requires_grad_()
                parameter.data = parameter.data.to(dtype)
        self._copies = dtype != torch.float32

    def collect_gradients(self) -> None:
        """Add the parameters' gradients to the main ones in fp32; call after each backward."""
        if not self._copies:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            main = self.weights[name]
            if main.grad is None:
                main.grad = parameter.grad.float()
            else:
                main.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether every main weight is a number; waits for the device."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.weights.values())

    @torch.no_grad()
    def publish(self) -> None:
        """Round the main weights into the parameters; call after each optimizer step."""
        if self._copies:
            for name, parameter in self._parameters.items():
                parameter.copy_(self.weights[name])

    @torch.no_grad()
    def restore(self, name: str, tensor: Tensor) -> None:
        """Set one main weight and its parameter from a checkpoint."""
        self.weights[name].copy_(tensor)
        if self._copies:
            self._parameters[name].copy_(tensor)
