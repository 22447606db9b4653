"""Weight gradients of matrices put off until asked for: the W part of zero-bubble schedules
(Qi et al. 2023, section 2).

A matrix product computes the gradient of its input in backward, as always, but notes what
the gradient of its weight needs instead of computing it. Norms, biases elsewhere and
embeddings cost next to nothing and are not delayed. One pass over the graph does it, so
recomputed activations are computed once and collectives run once, in their usual order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Deferred:
    """The delayed weight gradients of one module. micro: the micro-batch whose backward runs
    with delay, None while none does."""

    micro: int | None = None
    _waiting: dict[int, list[tuple[Tensor, Tensor | None, Tensor, Tensor]]] = field(
        default_factory=dict
    )

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As ``F.linear``. Delays the gradients of parameters only, not of tensors computed
        from them, nor under autocast."""
        leaves = weight.is_leaf and weight.requires_grad and (bias is None or bias.is_leaf)
        if not leaves or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, bias)
        out: Tensor = _Product.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        return out

    def put_off(self, weight: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor) -> None:
        """Note one product's share of the current micro-batch."""
        assert self.micro is not None
        self._waiting.setdefault(self.micro, []).append((weight, bias, x, grad))

    @torch.no_grad()
    def finish(self, micro: int) -> None:
        """Add the delayed gradients of one micro-batch to ``.grad``."""
        for weight, bias, x, grad in self._waiting.pop(micro, ()):
            _add(weight, _weight_gradient(x, grad))
            if bias is not None and bias.requires_grad:
                _add(bias, _bias_gradient(grad))

    @property
    def waiting(self) -> tuple[int, ...]:
        """Micro-batches with gradients to finish."""
        return tuple(self._waiting)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, to: Deferred) -> Tensor:
        ctx.save_for_backward(x, weight)
        # The parameters themselves: saved tensors come back as aliases after recomputation.
        ctx.parameters, ctx.to = (weight, bias), to
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        if ctx.to.micro is not None:
            ctx.to.put_off(*ctx.parameters, x, grad)
            return x_grad, None, None, None
        bias_grad = _bias_gradient(grad) if ctx.needs_input_grad[2] else None
        return x_grad, _weight_gradient(x, grad), bias_grad, None


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0)


def _add(parameter: Tensor, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad


class InjectedLinear(nn.Linear):
    """A linear layer whose matrix product is injected."""

    product: Any

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x, self.weight, self.bias)
        return out


def defer_weight_gradients(model: nn.Module) -> Deferred:
    """Make all matrix products of ``model`` able to delay their weight gradients.

    Plain linear layers are replaced by ones with the same parameters; any other module that
    has a ``product`` attribute gets it set (own kinds of layers, the output head). Call it
    before checkpointing and FSDP wrap the modules.
    """
    deferred = Deferred()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, injected(child))
    for module in model.modules():
        if hasattr(module, "product"):
            setattr(module, "product", deferred.product)  # noqa: B010
    return deferred


def injected(linear: nn.Linear) -> InjectedLinear:
    """The same layer, its parameters and hooks included, whose ``product`` can be replaced."""
    new = InjectedLinear.__new__(InjectedLinear)
    new.__dict__.update(linear.__dict__)
    new.product = F.linear
    return new
