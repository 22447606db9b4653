"""The kernel that multiplies one row with a layer's matrix, whatever the matrix is kept in.
Needs Triton.

Shape suffixes: E inputs, F outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor, nn

from mtk.kernels.gemv import gemv
from mtk.kernels.quantized_gemv import quantized_gemv
from mtk.quantization.kernel_product import has_kernels, kernel_product
from mtk.quantization.linear import QuantizedLinear
from mtk.quantization.packing import typed
from serving.paged.layers import PagedModel, Stacked
from serving.paged.quantized import QuantizedStack


class RowProduct(Protocol):
    """:func:`mtk.kernels.gemv.gemv` of one layer, bias included."""

    def __call__(
        self,
        x_1E: Tensor,
        *,
        norm: tuple[Tensor, float] | None = None,
        residual_1F: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor: ...


def row_product(layer: nn.Module | Stacked | QuantizedStack) -> RowProduct | None:
    """None for a layer that is neither plain nor one that the kernels know."""
    if isinstance(layer, QuantizedStack):
        layer = layer.linear
    if isinstance(layer, QuantizedLinear):
        if layer.input_scale is not None or not has_kernels(layer):
            return None
        weight = typed(layer.kind, layer.packed)
        return partial(quantized_gemv, weight=weight, scale_FG=layer.scale, bias_F=layer.bias)
    if isinstance(layer, Stacked) or type(layer) is nn.Linear:
        return partial(gemv, weight_FE=layer.weight, bias_F=layer.bias)
    return None


def use_kernels(paged: PagedModel) -> None:
    """Let quantised layers of a model multiply with kernels, on whatever device."""
    layers = list(paged.model.modules())
    for block in paged.blocks:
        for stacked in (getattr(part, "stacked", None) for part in (block.attention, block.mlp)):
            if isinstance(stacked, QuantizedStack):
                layers.append(stacked.linear)
    for layer in layers:
        if isinstance(layer, QuantizedLinear):
            layer.product = kernel_product
