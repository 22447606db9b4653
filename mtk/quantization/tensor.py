"""The one internal form of a quantised matrix, which every dialect is written from and read to.

Shape suffixes: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtk.errors import ConversionError

Kind = Literal["int8", "fp8", "int4"]
# How values of each kind are kept here; INT4 is -8..7 in a byte of its own.
STORED: dict[Kind, torch.dtype] = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int4": torch.int8,
}
BITS: dict[Kind, int] = {"int8": 8, "fp8": 8, "int4": 4}


@dataclass(frozen=True)
class QuantizedTensor:
    """weight = values x scale x input, of values_OI [O, I] as in ``STORED``.

    scale_OG: fp32 [O, G], of I / G inputs each (G = 1: one scale an output). input_I: fp32 [I], a
    factor of each input that AWQ and SmoothQuant leave beside the matrix, or None.
    """

    kind: Kind
    values_OI: Tensor
    scale_OG: Tensor
    input_I: Tensor | None = None

    def __post_init__(self) -> None:
        values, scale = self.values_OI, self.scale_OG
        fits = values.ndim == 2 and scale.ndim == 2 and scale.shape[0] == values.shape[0]
        fits = fits and scale.shape[1] > 0 and values.shape[1] % scale.shape[1] == 0
        if not fits or values.dtype != STORED[self.kind] or scale.dtype != torch.float32:
            raise ConversionError(
                f"an {self.kind.upper()} weight needs {STORED[self.kind]} [out, in] and fp32 "
                f"scales [out, groups], not {values.dtype} {list(values.shape)} and {scale.dtype} "
                f"{list(scale.shape)}."
            )
        if self.input_I is not None and self.input_I.shape != values.shape[1:]:
            raise ConversionError(
                f"factors of {list(self.input_I.shape)} inputs stand beside a weight of "
                f"{list(values.shape)}."
            )

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.values_OI.shape[1] // self.scale_OG.shape[1]

    def dequantize(self) -> Tensor:
        """fp32 [O, I]."""
        grouped = torch.unflatten(self.values_OI.float(), 1, (self.scale_OG.shape[1], -1))
        weight_OI = (grouped * self.scale_OG[:, :, None]).flatten(1)
        return weight_OI if self.input_I is None else weight_OI * self.input_I


def finite(weight_OI: Tensor, name: str) -> Tensor:
    """In fp32. Raises ConversionError for weights that are not finite."""
    weight_OI = weight_OI.float()
    if not weight_OI.isfinite().all():
        raise ConversionError(f"{name} holds values that are not finite; it cannot be quantised.")
    return weight_OI


def usable(scale: Tensor) -> Tensor:
    """1 where a scale is zero: rows of zeros, or so small that their scale underflows, become
    zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
