"""fp32 main weights beside parameters of lower precision, and the gradients of a step.

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

    gradients: of the step's loss times its scale, by the same names in the same order, None
    where there is none. One micro-batch leaves them in the type in which the model computed
    them; sums over several are fp32.
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
        self.gradients: dict[str, Tensor | None] = dict.fromkeys(self.weights)

    def rounded(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters here that follow their main weight in lower precision, by name."""
        for name, main in self.weights.items():
            parameter = self._parameters[name]
            if main is not parameter and not isinstance(parameter, DTensor):
                yield name, parameter

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Take over, or add in fp32, what a backward pass left; call after each of them."""
        for name, main in self.weights.items():
            parameter = self._parameters[name]
            gradient = parameter.grad
            if gradient is None:
                continue
            if main is parameter:
                # Left where it is: autograd adds the next micro-batch's to it in place.
                self.gradients[name] = gradient
                continue
            parameter.grad = None
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            found = self.gradients[name]
            # A single micro-batch's is not widened: nothing would be more exact, and the copy
            # costs a pass over memory. ``float`` copies once, at the second one.
            self.gradients[name] = local if found is None else found.float().add_(local)

    def clear_gradients(self) -> None:
        """Free all gradients; call before each step."""
        self.gradients = dict.fromkeys(self.weights)
        for name in self.weights:
            self._parameters[name].grad = None

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether every main weight of this rank is a number; waits for the device once."""
        found = [torch.isfinite(weight).all() for weight in self.weights.values()]
        return not found or bool(torch.stack(found).all())

    @torch.no_grad()
    def publish(self) -> None:
        """Round the main weights into the parameters."""
        for name, parameter in self.rounded():
            parameter.copy_(self.weights[name])

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
