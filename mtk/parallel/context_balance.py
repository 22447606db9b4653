"""Which tokens a context-parallel rank holds: head-tail balancing.

The sequence is cut in 2 x cp chunks of L tokens; rank r holds chunk r and chunk 2cp-1-r, in
this order, so that causal attention costs every rank the same (Zhu 2024, "zigzag" ring
attention; Megatron-core). Anything that compares positions must use the global ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.parallel import collectives
from mtk.parallel.groups import Group


def local_positions(length: int, cp: Group, device: torch.device | None = None) -> Tensor:
    """Global positions, int64 [length / cp], of the tokens that this rank holds.

    Raises ValueError where ``length`` does not divide; the configuration's rules say so to
    the user before.
    """
    return cut(torch.arange(length, device=device), cp, dim=0)


def cut(x: Tensor, cp: Group, dim: int = 1) -> Tensor:
    """This rank's part of the sequence dimension ``dim``: [B, S, ...] -> [B, S / cp, ...]."""
    if cp.size == 1:
        return x
    length = x.shape[dim]
    if length % (2 * cp.size):
        raise ValueError(f"a sequence of {length} does not divide over 2 x {cp.size} chunks")
    chunks = x.chunk(2 * cp.size, dim)
    return torch.cat((chunks[cp.rank], chunks[2 * cp.size - 1 - cp.rank]), dim)


def join(x: Tensor, cp: Group, site: str, dim: int = 1) -> Tensor:
    """The inverse of :func:`cut`: the whole sequence on every rank. Not differentiable."""
    if cp.size == 1:
        return x
    parts = collectives.all_gather(x.movedim(dim, 0), cp, site)
    return in_order(parts, cp.size, 0).movedim(0, dim)


def in_order(x: Tensor, cp: int, dim: int) -> Tensor:
    """The parts of all ranks side by side -> the tokens in their order."""
    chunks = torch.unflatten(x, dim, (cp, 2, -1))
    heads, tails = chunks.select(dim + 1, 0), chunks.select(dim + 1, 1)
    return torch.cat((heads, tails.flip(dim)), dim).flatten(dim, dim + 1)


def by_rank(x: Tensor, cp: int, dim: int) -> Tensor:
    """The inverse of :func:`in_order`."""
    heads, tails = torch.unflatten(x, dim, (2 * cp, -1)).chunk(2, dim)
    return torch.stack((heads, tails.flip(dim)), dim + 1).flatten(dim, dim + 2)
