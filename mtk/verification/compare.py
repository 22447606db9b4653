"""How far a layout's step is from that of one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.verification.observe import Observation, join

# Share of the model's greatest gradient below which a parameter's own scale says nothing.
FLOOR = 1e-3
# Share below which a gradient is nothing but rounding, and the scale of that rounding: it is
# that of the terms that cancel, not of what is left of them.
ROUNDING = 1e-6
CANCELLED = 1e-2


@dataclass(frozen=True)
class Tolerance:
    """Greatest accepted relative errors; of a tensor: the greatest difference over the
    greatest value of the reference (weights: absolute, a step moves them by about lr)."""

    loss: float = 1e-6
    norm: float = 1e-6
    gradient: float = 1e-5
    weight: float = 1e-5
    balance: float = 1e-6


@dataclass(frozen=True)
class Difference:
    """loss, norm: relative errors; balance: the greatest of the figures of experts' balance;
    gradients, weights: error of each parameter by name, kept buffers among the weights (any
    difference there is too much); failures: what is over.

    drifted: copies on ranks that are not the same bytes after the step, in words.

    vanishing: parameters whose gradient is zero but for rounding. Adam makes a step of up to
    lr from the sign of that rounding, so their updated weights are not compared.
    """

    loss: float
    norm: float
    gradients: Mapping[str, float]
    weights: Mapping[str, float]
    tolerance: Tolerance
    vanishing: tuple[str, ...] = ()
    balance: float = 0.0
    drifted: tuple[str, ...] = ()

    @property
    def worst_gradient(self) -> tuple[str, float]:
        return _worst(self.gradients)

    @property
    def worst_weight(self) -> tuple[str, float]:
        return _worst(self.weights)

    @property
    def failures(self) -> list[str]:
        found = []
        for what in ("loss", "norm", "balance"):
            error, limit = getattr(self, what), getattr(self.tolerance, what)
            if not error <= limit:
                found.append(f"{what}: relative error {error:.2e} > {limit:.0e}")
        for what in ("gradient", "weight"):
            limit = getattr(self.tolerance, what)
            for name, error in sorted(getattr(self, f"{what}s").items()):
                if not error <= limit:
                    found.append(f"{what} of {name}: error {error:.2e} > {limit:.0e}")
        return found + [f"copies that must be equal differ: {text}" for text in self.drifted]


def compare(
    one: Observation, ranks: Sequence[Observation], tolerance: Tolerance = Tolerance()
) -> Difference:
    """``ranks`` against one process. Raises ValueError when the ranks' blocks do not make up
    the model, or ranks disagree about loss, norm or balance."""
    reference = {name: torch.from_numpy(array) for name, _, array in one.gradients}
    weights = {name: torch.from_numpy(array) for name, _, array in one.weights}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found = [(rank.loss, rank.norm, *rank.balance) for rank in ranks]
    if len(set(found)) != 1 and not all(math.isnan(sum(values)) for values in found):
        raise ValueError(f"ranks disagree about (loss, norm, balance): {found}")
    gradients = join((rank.gradients for rank in ranks), shapes)
    updated = join((rank.weights for rank in ranks), shapes)
    kept = {name: torch.from_numpy(array) for name, _, array in one.buffers}
    buffers = join((rank.buffers for rank in ranks), {n: b.shape for n, b in kept.items()})
    # Some gradients are zero but for rounding (a key bias shifts all scores of a query alike);
    # their error is measured on the scale of the model's gradients instead.
    top = max(_largest(gradient) for gradient in reference.values())
    floor = FLOOR * top
    vanishing = frozenset(n for n, g in reference.items() if _largest(g) < ROUNDING * top)
    return Difference(
        loss=_relative(ranks[0].loss, one.loss),
        norm=_relative(ranks[0].norm, one.norm),
        gradients={
            n: _error(gradients[n], reference[n], CANCELLED * top if n in vanishing else floor)
            for n in shapes
        },
        weights={n: _largest(updated[n] - weights[n]) for n in shapes if n not in vanishing}
        | {n: 0.0 if torch.equal(buffers[n], kept[n]) else math.inf for n in kept},
        tolerance=tolerance,
        vanishing=tuple(sorted(vanishing)),
        balance=max(map(_relative, ranks[0].balance, one.balance), default=0.0),
        drifted=tuple(dict.fromkeys(text for rank in ranks for text in rank.drifted)),
    )


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-30)


def _error(value: Tensor, reference: Tensor, floor: float) -> float:
    return _largest(value - reference) / max(_largest(reference), floor, 1e-30)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _worst(errors: Mapping[str, float]) -> tuple[str, float]:
    return max(errors.items(), key=lambda item: item[1], default=("-", 0.0))
