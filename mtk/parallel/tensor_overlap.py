"""Matrix products that run while their inputs arrive or their results leave (Wang et al. 2023,
"Overlap communication with dependent computation via decomposition").

With sequence parallelism every product of a tensor-parallel layer follows a gather of rows or is
followed by a sum that is scattered. In forward each rank's run of rows is multiplied as it
comes, or sent as soon as it is done; on CUDA through torch's symmetric memory, that is by copy
engines. Of backward, gathers are hidden in the same way, and a scattered sum behind the product
for the weights' gradient. On the CPU the same functions do one after the other.

Shape suffixes: R rows of this rank, M rows of all ranks, E channels in, F channels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtk.models.attention import Attention
from mtk.models.mlp import MLP
from mtk.parallel.collectives import (
    finish,
    gather_products,
    products_scatter,
    start_reduce_scatter,
)
from mtk.parallel.groups import Group


class _Enter(torch.autograd.Function):
    """Rows of this rank to products of all rows with several weights [F, E]."""

    @staticmethod
    def forward(
        ctx: Any, x_RE: Tensor, group: Group, site: str, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        x_ME, products = gather_products(x_RE, [w.t() for w in weights], group, site)
        ctx.group, ctx.site = group, site
        ctx.save_for_backward(x_ME, *weights)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ME, *weights = ctx.saved_tensors
        grad_ME = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_ME = torch.addmm(grad_ME, grad, weight)
        leaving = start_reduce_scatter(grad_ME, ctx.group, f"{ctx.site}.backward")
        weight_grads = [grad.t() @ x_ME for grad in grads]
        return finish(leaving, ctx.group), None, None, *weight_grads


class _Leave(torch.autograd.Function):
    """x @ weight^T summed over ranks, this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x_ME: Tensor, weight_FE: Tensor, group: Group, site: str) -> Tensor:
        ctx.group, ctx.site = group, site
        ctx.save_for_backward(x_ME, weight_FE)
        return products_scatter(x_ME, weight_FE.t(), group, site)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ME, weight_FE = ctx.saved_tensors
        site = f"{ctx.site}.backward"
        grad_MF, (x_grad,) = gather_products(grad_RF, [weight_FE], ctx.group, site)
        return x_grad, grad_MF.t() @ x_ME, None, None


class Entry(nn.Module):
    """The way of a residual stream's rows into linear layers. sequence: tokens of a sample."""

    def __init__(self, group: Group, sequence: int, site: str) -> None:
        super().__init__()
        self.group, self.sequence, self.site = group, sequence, site

    def forward(self, x: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
        """[R, E] (any leading shape) to the layers' outputs [B, S, F]."""
        weights = [layer.weight for layer in layers]
        rows = x.reshape(-1, x.shape[-1])
        products: tuple[Tensor, ...] = _Enter.apply(rows, self.group, self.site, *weights)  # type: ignore[no-untyped-call]
        found = []
        for product, layer in zip(products, layers, strict=True):
            out = product.view(-1, self.sequence, product.shape[-1])
            found.append(out if layer.bias is None else out + layer.bias)
        return found


class OverlappedAttention(Attention):
    """Takes rows of this rank; query, key and value are made as the others' arrive."""

    entry: Entry

    def project(self, x_BSE: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        del source  # the same tensor
        query, key, value = self.entry(x_BSE, (self.query, self.key, self.value))
        return query, key, value


class OverlappedMLP(MLP):
    """Takes rows of this rank."""

    entry: Entry

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.entry(x, (self.up,))[0]))  # type: ignore[no-any-return]
        gate, up = self.entry(x, (self.gate, self.up))
        return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]


class OverlappedRowParallelLinear(nn.Linear):
    """A linear layer cut by input columns; gives rows of this rank. The bias is added once,
    after the sum."""

    def __init__(self, linear: nn.Linear, group: Group, site: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.site = group, site

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Leave.apply(x.flatten(0, -2), self.weight, self.group, self.site)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


def overlap_attention(attention: Attention, group: Group, sequence: int, site: str) -> None:
    """In place of the hook that gathers; sizes are those of this rank's part already."""
    attention.__class__ = OverlappedAttention
    attention.entry = Entry(group, sequence, site)
    attention.output = OverlappedRowParallelLinear(attention.output, group, f"{site}.output")


def overlap_mlp(mlp: MLP, group: Group, sequence: int, site: str) -> None:
    """Likewise."""
    mlp.__class__ = OverlappedMLP
    mlp.entry = Entry(group, sequence, site)
    mlp.down = OverlappedRowParallelLinear(mlp.down, group, f"{site}.down")
