"""What keeps a router in balance: losses and how they enter the gradient, and biases.

Each MoE layer works out its part of the losses from what it sees and attaches it to an
activation; the gradient joins in backward, so no loss has to travel through the model to its
end. This works on any pipeline stage and under recomputation.

Aux loss (Fedus et al. 2022, section 2.2, per sequence): X / (k S^2) sum_e n_e P_e, where n_e
tokens of a sequence of S chose expert e of X, and P_e is the sum of their probabilities for
it. 1 in balance, X / k when all tokens choose the same experts. Z-loss (Zoph et al. 2022,
section 3.3): logsumexp(logits)^2. Both are means, over the sequences and over the tokens of
the global batch, and therefore the same in every layout.

Biases (Wang et al. 2024, algorithm 1): after each step every expert's bias moves by a fixed
amount, up if fewer tokens of the global batch chose it than an even share, down if more. The
counts are whole numbers, so the biases are the same, bit for bit, on all ranks and wherever
the same experts were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.kernels.transfer import send

NAMES = ("moe_aux_loss", "moe_z_loss")


class Load:
    """How many tokens chose each expert of one layer since :meth:`BalanceLosses.begin`: int64
    [X], None before. Before any capacity; of all tokens that the layer's region sees."""

    def __init__(self) -> None:
        self.counts_X: Tensor | None = None


class BalanceLosses:
    """The record that all MoE layers of one model share; whoever trains calls :meth:`begin`.

    Before that the losses have no part in the gradient; layers in eval mode compute none.
    scale: weight in the gradient, and total: sums so far, each fp32 [aux, z]. loads: of the
    whole model's MoE layers in order; a pipeline stage counts in its own only. holders: ranks
    that see the same tokens and attach the same losses.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.coefficients = (config.aux_loss_coeff, config.moe_z_loss_coeff)
        self.experts = config.num_experts or 0
        self.layers = config.moe_layers
        self.loads: list[Load] = []
        self.counts = (1, 1)
        self.holders = 1
        self.scale: Tensor | None = None
        self.total: Tensor | None = None

    def new_layer(self) -> Load:
        """To be called by each MoE layer when it is made."""
        self.loads.append(Load())
        return self.loads[-1]

    def begin(self, device: torch.device, *, samples: int, tokens: int, loss_scale: float) -> None:
        """Start a step. samples, tokens: of the whole global batch, over all ranks; masked
        tokens count, as they are routed too."""
        self.counts = (max(samples, 1), max(tokens, 1))
        scales = [
            coefficient * loss_scale / count
            for coefficient, count in zip(self.coefficients, self.counts, strict=True)
        ]
        self.scale = send(torch.tensor(scales, dtype=torch.float32), device)
        self.total = torch.zeros(2, device=device)
        for load in self.loads:
            load.counts_X = torch.zeros(self.experts, dtype=torch.int64, device=device)

    def attach(self, x: Tensor, aux: Tensor, z: Tensor, counts_X: Tensor, load: Load) -> Tensor:
        """``x``, with the gradients of a layer's sums over sequences and over tokens tied on,
        and its counts of tokens noted in ``load``."""
        if self.scale is None:
            return x
        values = torch.stack((aux, z))
        out: Tensor = _Attach.apply(  # type: ignore[no-untyped-call]
            x, values, counts_X, self.scale, self.total, load.counts_X
        )
        return out

    def means(self) -> Tensor:
        """fp32 [aux, z] of the micro-batches since :meth:`begin`, without coefficients, averaged
        over layers: this rank's part, to be summed over all ranks."""
        if self.total is None:
            return torch.zeros(2)
        counts = send(torch.tensor(self.counts, dtype=torch.float32), self.total.device)
        return self.total / (counts * max(self.layers, 1) * self.holders)

    def chosen(self, device: torch.device) -> Tensor:
        """int64 [MoE layers of the model, X] since :meth:`begin`; zeros of other stages' layers."""
        none = torch.zeros(self.experts, dtype=torch.int64, device=device)
        rows = [none if load.counts_X is None else load.counts_X for load in self.loads]
        return torch.stack(rows) if rows else none[None, :][:0]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        counts_X: Tensor,
        scale: Tensor,
        total: Tensor,
        load_X: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.total, ctx.load_X = scale, total, load_X
        ctx.save_for_backward(values, counts_X)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        # Counted here, as backward runs once for each micro-batch and a forward may be repeated.
        values, counts_X = ctx.saved_tensors
        ctx.total.add_(values)
        ctx.load_X.add_(counts_X)
        return grad, ctx.scale, None, None, None, None


def max_violation(chosen_LX: Tensor) -> Tensor:
    """By how much the most chosen expert exceeds an even share, as a share of that, averaged
    over layers (Wang et al. 2024, equation 4); fp64 scalar. chosen_LX: of the global batch."""
    even_L = chosen_LX.double().mean(-1).clamp(min=1e-30)
    return (chosen_LX.amax(-1) / even_L - 1.0).mean()


@torch.no_grad()
def move_biases(biases_X: Mapping[int, Tensor], chosen_LX: Tensor, rate: float) -> None:
    """Move the biases of some MoE layers, by number, in place; ``chosen_LX`` as above, in a
    type that holds the counts times X exactly."""
    for layer, bias_X in biases_X.items():
        chosen_X = chosen_LX[layer]
        missing_X = chosen_X.sum() - chosen_X * chosen_X.shape[0]
        bias_X.add_(missing_X.sign().to(bias_X.dtype), alpha=rate)
