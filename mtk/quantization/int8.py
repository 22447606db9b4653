"""INT8 weights with one scale for each output channel, activations untouched (W8A16).

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.quantization.tensor import QuantizedTensor, finite, usable

LARGEST = 127


def quantize(weight_OI: Tensor, name: str) -> QuantizedTensor:
    """Round to the nearest of 255 levels; scale = largest magnitude of the row / 127.

    Raises ConversionError for weights that are not finite.
    """
    weight_OI = finite(weight_OI, name)
    scale_O1 = usable(weight_OI.abs().amax(dim=1, keepdim=True) / LARGEST)
    values = (weight_OI / scale_O1).round().clamp(-LARGEST, LARGEST)
    return QuantizedTensor("int8", values.to(torch.int8), scale_O1)


def bound(weight_OI: Tensor) -> Tensor:
    """How far a weight may be from its rounded value: half a level of its row."""
    return weight_OI.abs().amax(dim=1, keepdim=True) * (0.5001 / LARGEST) + 1e-30
