"""fp32 main weights beside parameters of lower precision.

The optimizer and checkpoints see the main weights only. For fp32 training they are the
parameters themselves and nothing is copied. Under FSDP the stored shards are the main
weights: it gathers them in lower precision and reduces gradients in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class MainWeights:
    """Main weights by name, as plain tensors of what this rank holds.

    Construct it while the model still has its fp32 initial weights, so that the main
    weights start unrounded; the model computes in ``dtype`` afterwards. Buffers (rotary
    tables) stay fp32. Frozen parameters have no main weight, and are kept in ``dtype`` only.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = dict(parameters)
        self.weights: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(dtype)
            elif isinstance(parameter, DTensor):
                self.weights[name] = parameter.to_local().detach()
            elif dtype == torch.float32:
                self.weights[name] = parameter
            else:
                self.weights[name] = parameter.detach().clone().requires_grad_()
                parameter.data = parameter.data.to(dtype)

    def _separate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, main weight) where the two are not the same object."""
        for name, main in self.weights.items():
            if main is not self._parameters[name]:
                yield self._parameters[name], main

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the parameters' gradients to the main ones in fp32; call after each backward."""
        for parameter, main in self._separate():
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if main.grad is None:
                main.grad = local.float()
            else:
                main.grad += local
            parameter.grad = None

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether every main weight of this rank is a number; waits for the device."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.weights.values())

    @torch.no_grad()
    def publish(self) -> None:
        """Round the main weights into the parameters; call after each optimizer step."""
        for parameter, main in self._separate():
            if not isinstance(parameter, DTensor):
                parameter.copy_(main)

    @torch.no_grad()
    def restore(self, name: str, tensor: Tensor) -> None:
        """Set one main weight, if there is one, and its parameter from a checkpoint."""
        parameter = self._parameters[name]
        if name in self.weights:
            self.weights[name].copy_(tensor)
        elif isinstance(parameter, DTensor):
            parameter.to_local().copy_(tensor)
        if not isinstance(parameter, DTensor):
            parameter.copy_(tensor)
