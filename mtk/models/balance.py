"""Losses that keep a router in balance: how they enter the gradient, and their values.

Each MoE layer works out its part of the losses from what it sees and attaches it to an
activation; the gradient joins in backward, so no loss has to travel through the model to its
end. This works on any pipeline stage and under recomputation.

Aux loss (Fedus et al. 2022, section 2.2, per sequence): X / (k S^2) sum_e n_e P_e, where n_e
tokens of a sequence of S chose expert e of X, and P_e is the sum of their probabilities for
it. 1 in balance, X / k when all tokens choose the same experts. Z-loss (Zoph et al. 2022,
section 3.3): logsumexp(logits)^2. Both are means, over the sequences and over the tokens of
the global batch, and therefore the same in every layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtk.config.model import ModelConfig

NAMES = ("moe_aux_loss", "moe_z_loss")


class BalanceLosses:
    """The record that all MoE layers of one model share; whoever trains calls :meth:`begin`.

    Before that the losses have no part in the gradient; layers in eval mode compute none.
    scale: weight in the gradient, and total: sums so far, each fp32 [aux, z]. holders: ranks
    that see the same tokens and attach the same losses.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.coefficients = (config.moe_aux_loss_coeff, config.moe_z_loss_coeff)
        self.layers = config.moe_layers
        self.counts = (1, 1)
        self.holders = 1
        self.scale: Tensor | None = None
        self.total: Tensor | None = None

    def begin(self, device: torch.device, *, samples: int, tokens: int, loss_scale: float) -> None:
        """Start a step. samples, tokens: of the whole global batch, over all ranks; masked
        tokens count, as they are routed too."""
        self.counts = (max(samples, 1), max(tokens, 1))
        scales = [
            coefficient * loss_scale / count
            for coefficient, count in zip(self.coefficients, self.counts, strict=True)
        ]
        self.scale = torch.tensor(scales, dtype=torch.float32).to(device, non_blocking=True)
        self.total = torch.zeros(2, device=device)

    def attach(self, x: Tensor, aux: Tensor, z: Tensor) -> Tensor:
        """``x``, with the gradients of a layer's sums over sequences and over tokens tied on."""
        if self.scale is None:
            return x
        values = torch.stack((aux, z))
        out: Tensor = _Attach.apply(x, values, self.scale, self.total)  # type: ignore[no-untyped-call]
        return out

    def means(self) -> Tensor:
        """fp32 [aux, z] of the micro-batches since :meth:`begin`, without coefficients, averaged
        over layers: this rank's part, to be summed over all ranks."""
        if self.total is None:
            return torch.zeros(2)
        counts = torch.tensor(self.counts, dtype=torch.float32).to(self.total.device)
        return self.total / (counts * max(self.layers, 1) * self.holders)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, total: Tensor) -> Tensor:
        ctx.scale, ctx.total = scale, total
        ctx.save_for_backward(values)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # Counted here, as backward runs once for each micro-batch and a forward may be repeated.
        (values,) = ctx.saved_tensors
        ctx.total.add_(values)
        return grad, ctx.scale, None, None
