"""Quantised matrices as they lie on a device, in as many bits as they have.

INT8 and FP8 are bytes. INT4 comes eight in a 32-bit word: of a group of inputs, word j holds
inputs j, j + g/8, j + 2 g/8, ... from the lowest bits up, plus 8. A thread that unpacks
neighbouring words so meets neighbouring inputs, and a shift and a mask are all a value costs.

Shape suffixes: O outputs, I inputs, G groups, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.quantization.tensor import STORED, Kind, QuantizedTensor

# Values in a word of INT4, and what is added to them.
EACH, ZERO = 8, 8
PACKED: dict[Kind, torch.dtype] = {
    "int8": torch.int8,
    # As bytes, so that no cast of a model's type touches them.
    "fp8": torch.uint8,
    "int4": torch.int32,
}


def packed_shape(kind: Kind, outputs: int, inputs: int) -> tuple[int, int]:
    return (outputs, inputs // EACH) if kind == "int4" else (outputs, inputs)


def pack(q: QuantizedTensor) -> Tensor:
    """[O, I], or [O, I / 8] of INT4, whose groups are multiples of 8."""
    if q.kind != "int4":
        return q.values_OI.view(PACKED[q.kind])
    outputs = q.values_OI.shape[0]
    above = (q.values_OI.to(torch.int32) + ZERO).view(outputs, -1, EACH, q.group // EACH)
    word = above[:, :, 0].clone()
    for place in range(1, EACH):
        word |= above[:, :, place] << (4 * place)
    return word.flatten(1)


def unpack(kind: Kind, packed: Tensor, groups: int) -> Tensor:
    """The values [O, I] of ``groups`` groups a row, as in :data:`STORED`."""
    if kind != "int4":
        return packed.view(STORED[kind])
    words = packed.view(packed.shape[0], groups, 1, -1)
    shifts = torch.arange(0, 4 * EACH, 4, dtype=torch.int32, device=packed.device)
    values = ((words >> shifts[:, None]) & 15) - ZERO
    return values.flatten(1).to(torch.int8)


def typed(kind: Kind, packed: Tensor) -> Tensor:
    """What kernels are given: FP8 by its own type."""
    return packed.view(STORED[kind]) if kind == "fp8" else packed
