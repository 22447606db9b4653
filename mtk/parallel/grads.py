"""Gradients after backward: sums of parts, and the global norm over mixed layouts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtk.parallel.collectives import all_reduce
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece


@torch.no_grad()
def sum_partial_gradients(weights: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> None:
    """Complete gradients of which each rank has a part (``Piece.partial``), in place.

    One collective a group for all of its parameters: norms and biases under sequence
    parallelism, shared key/value heads, tied embeddings on two stages.
    """
    groups: dict[str, Group] = {g.name: g for piece in pieces.values() for g in piece.partial}
    for name in sorted(groups):
        shared = [
            weight
            for key, weight in weights.items()
            if any(group.name == name for group in pieces[key].partial)
        ]
        members = [
            # Other ranks of the group may have used what this one did not.
            torch.zeros_like(weight) if weight.grad is None else weight.grad
            for weight in shared
        ]
        if members:
            flat = torch.cat([gradient.flatten() for gradient in members])
            summed = all_reduce(flat, groups[name], f"grads.{name}")
            parts = torch.split(summed, [gradient.numel() for gradient in members])
            for weight, gradient, part in zip(shared, members, parts, strict=True):
                weight.grad = gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def squared_norm(
    weights: Mapping[str, Tensor], pieces: Mapping[str, Piece], device: torch.device
) -> Tensor:
    """fp64 scalar: this rank's share of the squared L2 norm of all gradients.

    Every value of the model counts once: where ranks hold copies, their first one counts.
    """
    own = [
        weight.grad
        for name, weight in weights.items()
        if weight.grad is not None and pieces[name].owner
    ]
    if not own:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(own).double().square()
