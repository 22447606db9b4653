"""INT4 weights with one scale for each group of inputs of an output, symmetric (W4A16).

Levels are -8..7; the scale is that of llm-compressor and vLLM's W4A16: the largest magnitude of
the group lies half a level beyond 7, so that no weight is off by more than half a level.

Shape suffixes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.errors import ConversionError
from mtk.quantization.tensor import QuantizedTensor, finite, usable

LOWEST, HIGHEST = -8, 7
HALF_RANGE = 7.5


def quantize(weight_OI: Tensor, name: str, group: int) -> QuantizedTensor:
    """Round to the nearest of 16 levels; scale = largest magnitude of ``group`` inputs / 7.5.

    Raises ConversionError for weights that are not finite or whose inputs are no whole groups.
    """
    grouped = _grouped(finite(weight_OI, name), name, group)
    scale_OG = usable(grouped.abs().amax(dim=2) / HALF_RANGE)
    values = (grouped / scale_OG[:, :, None]).round().clamp(LOWEST, HIGHEST)
    return QuantizedTensor("int4", values.to(torch.int8).flatten(1), scale_OG)


def bound(weight_OI: Tensor, group: int) -> Tensor:
    """How far a weight may be from its rounded value: half a level of its group."""
    largest = _grouped(weight_OI, "weight", group).abs().amax(dim=2, keepdim=True)
    return (largest * (0.5001 / HALF_RANGE) + 1e-30).expand(-1, -1, group).flatten(1)


def _grouped(weight_OI: Tensor, name: str, group: int) -> Tensor:
    outputs, inputs = weight_OI.shape
    if inputs % group or outputs % 2:
        raise ConversionError(
            f"{name} is [{outputs}, {inputs}]: INT4 needs inputs in whole groups of {group} and an "
            f"even number of outputs. Lower --group-size, or take --format int8_wo."
        )
    return torch.unflatten(weight_OI, 1, (-1, group))
