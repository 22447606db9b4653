"""Attention on whole sequences, what every kernel on parts of them must reproduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.models.attention import AttentionKernel, reference_kernel
from mtk.parallel.context import cut, join
from mtk.parallel.groups import Group

# Query heads and key/value heads: MHA, GQA, MQA.
HEADS = {"MHA": (12, 12), "GQA": (12, 3), "MQA": (12, 1)}


@dataclass
class Case:
    """q [B, H, S, D], k and v [B, G, S, D], the gradient of the output, documents [B, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    documents: Tensor | None


def make_case(
    heads: tuple[int, int],
    length: int,
    *,
    documents: bool = False,
    dtype: torch.dtype = torch.float32,
    channels: int = 8,
    batch: int = 2,
    device: str = "cpu",
) -> Case:
    """Random tensors, the same on every rank. Documents have all lengths from one token to
    several chunks, and are different in each row."""
    generator = torch.Generator().manual_seed(length + heads[1])

    def normal(count: int) -> Tensor:
        x = torch.randn(batch, length, count, channels, generator=generator)
        return x.transpose(1, 2).to(device, dtype)  # the strides that a model gives

    starts = torch.rand(batch, length, generator=generator) < 4 / length
    starts[:, length // 2] = True
    numbers = starts.cumsum(1).to(device) if documents else None
    return Case(normal(heads[0]), normal(heads[1]), normal(heads[1]), normal(heads[0]), numbers)


def whole(case: Case, kernel: AttentionKernel = reference_kernel) -> list[Tensor]:
    """Output and gradients of q, k and v, on the whole sequence."""
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = kernel(*leaves, mask=None, dropout=0.0, documents=case.documents)
    out.backward(case.grad)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def on_ranks(case: Case, kernel: AttentionKernel, cp: Group) -> list[Tensor]:
    """As :func:`whole`, with this rank's part given to ``kernel`` and the parts joined."""
    leaves = [cut(x, cp, 2).detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    documents = None if case.documents is None else cut(case.documents, cp)
    out = kernel(*leaves, mask=None, dropout=0.0, documents=documents)
    out.backward(cut(case.grad, cp, 2))
    parts = [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
    return [join(x, cp, "test", 2) for x in parts]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Greatest difference of the output and of each gradient, beside the greatest value; NaN
    is infinitely wrong."""
    return [
        ((a.double() - b.double()).abs().max() / b.double().abs().max())
        .nan_to_num(torch.inf)
        .item()
        for a, b in zip(found, wanted, strict=True)
    ]
