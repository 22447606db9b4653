"""FP8 weights (e4m3fn of Micikevicius et al. 2022) with one scale for each output channel.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.quantization.tensor import QuantizedTensor, finite, usable

# The largest number; half a step in units of a number, and below the normal ones.
LARGEST = 448.0
HALF_STEP, HALF_SUBNORMAL = 2.0**-4, 2.0**-10


def quantize(weight_OI: Tensor, name: str) -> QuantizedTensor:
    """Round to the nearest number of e4m3; scale = largest magnitude of the row / 448.

    Raises ConversionError for weights that are not finite.
    """
    weight_OI = finite(weight_OI, name)
    scale_O1 = usable(weight_OI.abs().amax(dim=1, keepdim=True) / LARGEST)
    # Rounding of the quotient may exceed the largest number, which a cast would make NaN.
    values = (weight_OI / scale_O1).clamp(-LARGEST, LARGEST)
    return QuantizedTensor("fp8", values.to(torch.float8_e4m3fn), scale_O1)


def bound(weight_OI: Tensor) -> Tensor:
    """How far a weight may be from its rounded value: half a step at its own magnitude."""
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / LARGEST
    half = torch.maximum(weight_OI.abs() * HALF_STEP, scale_O1 * HALF_SUBNORMAL)
    return half * 1.0001 + 1e-30
