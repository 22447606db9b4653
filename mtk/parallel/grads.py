"""Gradients after backward: sums of parts, and the global norm over mixed layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor

from mtk.parallel.collectives import all_reduce
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece


@torch.no_grad()
def sum_partial_gradients(
    weights: Mapping[str, Tensor],
    gradients: MutableMapping[str, Tensor | None],
    pieces: Mapping[str, Piece],
) -> None:
    """Complete ``gradients`` (by name, None where this rank has none) of which each rank has a
    part (``Piece.partial``). They are summed in fp32, and are fp32 afterwards.

    One collective a group for all of its parameters: norms and biases under sequence
    parallelism, shared key/value heads, tied embeddings on two stages. weights: fp32, for their
    shapes and devices.
    """
    groups: dict[str, Group] = {g.name: g for piece in pieces.values() for g in piece.partial}
    for name in sorted(groups):
        shared = [
            key for key in weights if any(group.name == name for group in pieces[key].partial)
        ]
        members = []
        for key in shared:
            gradient = gradients[key]
            # Other ranks of the group may have used what this one did not.
            members.append(torch.zeros_like(weights[key]) if gradient is None else gradient.float())
        if members:
            flat = torch.cat([gradient.flatten() for gradient in members])
            summed = all_reduce(flat, groups[name], f"grads.{name}")
            parts = torch.split(summed, [gradient.numel() for gradient in members])
            for key, gradient, part in zip(shared, members, parts, strict=True):
                gradients[key] = gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """L2 norm over all ``gradients`` of any types, summed up in fp32: an fp32 scalar on
    ``device``, zero without gradients, inf or nan where one is not finite."""
    found = list(gradients)
    if not found:
        return torch.zeros((), device=device)
    norms: dict[int, Tensor] = {}
    # Tensors of one type go in a few kernels, of mixed types in one each.
    for dtype in {gradient.dtype for gradient in found}:
        alike = [index for index, gradient in enumerate(found) if gradient.dtype == dtype]
        own = torch._foreach_norm([found[index] for index in alike], 2.0, torch.float32)
        norms.update(zip(alike, own, strict=True))
    total: Tensor = torch.linalg.vector_norm(torch.stack([norms[k] for k in sorted(norms)]))
    return total


@torch.no_grad()
def squared_norm(
    gradients: Mapping[str, Tensor | None], pieces: Mapping[str, Piece], device: torch.device
) -> Tensor:
    """fp64 scalar: this rank's share of the squared L2 norm of all gradients.

    Every value of the model counts once: where ranks hold copies, their first one counts.
    """
    own = [g for name, g in gradients.items() if g is not None and pieces[name].owner]
    return total_norm(own, device).double().square()
