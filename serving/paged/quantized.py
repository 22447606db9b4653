"""Layers with quantised weights in steps of the engine.

Shape suffixes: E inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from mtk.quantization.linear import QuantizedLinear, can_join, join


class QuantizedStack:
    """As :class:`serving.paged.layers.Stacked`, of quantised layers; ``linear`` is all of them."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        held = cast(Sequence[QuantizedLinear], linears)
        self.sizes = [linear.out_features for linear in held]
        self.linear = join(held)

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def can_stack_quantized(modules: Sequence[nn.Module]) -> bool:
    """Whether :class:`QuantizedStack` takes them."""
    return can_join(modules)
