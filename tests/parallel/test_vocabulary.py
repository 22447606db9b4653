"""Cross-entropy over a vocabulary in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.parallel.dims import Dims
from mtk.parallel.ranks import make_ranks
from mtk.parallel.vocabulary import vocab_parallel_losses
from mtk.training.loss import token_losses
from tests.parallel.ranks import run_ranks

CLASSES = 32


def _likely() -> tuple[Tensor, Tensor]:
    """bf16 logits [B, S, V] and targets [B, S] whose probability is 0.9 to 0.999."""
    generator = torch.Generator().manual_seed(0)
    labels_BS = torch.randint(0, CLASSES, (4, 32), generator=generator)
    logits_BSV = torch.randn(4, 32, CLASSES, generator=generator)
    margin_BS = torch.linspace(6.0, 11.0, 128).view(4, 32, 1)
    logits_BSV = logits_BSV.scatter_(-1, labels_BS[..., None], margin_BS)
    return logits_BSV.bfloat16(), labels_BS


def _gradient(rank: int) -> Tensor:
    """Of this rank's part of the logits, on every rank."""
    ranks = make_ranks(Dims(tp=2), rank=rank, device=torch.device("cpu"))
    logits_BSV, labels_BS = _likely()
    part = logits_BSV.chunk(2, -1)[rank].clone().requires_grad_()
    vocab_parallel_losses(part, labels_BS, ranks.tp, CLASSES).sum().div(3.0).backward()
    assert part.grad is not None
    return part.grad.float()


def test_gradients_of_likely_targets_are_as_exact_as_in_one_process() -> None:
    """p - 1 is taken before rounding to bf16: after it, little of the gradient would be left."""
    logits_BSV, labels_BS = _likely()
    whole = logits_BSV.float().requires_grad_()
    token_losses(whole, labels_BS).sum().div(3.0).backward()
    assert whole.grad is not None
    found = torch.cat(run_ranks(2, _gradient), -1)
    assert float(((found - whole.grad).abs() / whole.grad.abs()).max()) < 2**-8
