"""INT8 weights with one scale for each output channel, activations untouched (W8A16).

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.errors import ConversionError

LARGEST = 127


@dataclass(frozen=True)
class QuantizedTensor:
    """The one internal form every dialect is written from and read to.

    values_OI: int8. scale_O: fp32, so that weight = values x scale.
    """

    values_OI: Tensor
    scale_O: Tensor

    def __post_init__(self) -> None:
        fits = self.values_OI.ndim == 2 and self.scale_O.shape == self.values_OI.shape[:1]
        if not fits or self.values_OI.dtype != torch.int8 or self.scale_O.dtype != torch.float32:
            raise ConversionError(
                f"an INT8 weight needs int8 [out, in] and fp32 scales [out], not "
                f"{self.values_OI.dtype} {list(self.values_OI.shape)} and "
                f"{self.scale_O.dtype} {list(self.scale_O.shape)}."
            )

    def dequantize(self) -> Tensor:
        """fp32 [out, in]."""
        return self.values_OI.float() * self.scale_O[:, None]


def quantize(weight_OI: Tensor, name: str) -> QuantizedTensor:
    """Round to the nearest of 255 levels; scale = largest magnitude of the row / 127.

    Raises ConversionError for weights that are not finite.
    """
    weight_OI = weight_OI.float()
    if not weight_OI.isfinite().all():
        raise ConversionError(f"{name} holds values that are not finite; it cannot be quantised.")
    scale_O = weight_OI.abs().amax(dim=1) / LARGEST
    # A row of zeros, or one so small that its scale underflows, quantises to zeros.
    scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
    values = (weight_OI / scale_O[:, None]).round().clamp(-LARGEST, LARGEST)
    return QuantizedTensor(values.to(torch.int8), scale_O)
