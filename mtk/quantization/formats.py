"""What ``--format`` names: how weights are rounded, and how far they may then be off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mtk.quantization import float8, int4, int8
from mtk.quantization.tensor import Kind, QuantizedTensor

GROUP = 128
# Of tensors and of command lines.
KINDS: Mapping[str, Kind] = {"int8_wo": "int8", "fp8": "fp8", "int4_wo": "int4"}


@dataclass(frozen=True)
class Format:
    """quantize(weight [out, in], name) and bound(weight), the largest error allowed of each."""

    kind: Kind
    quantize: Callable[[Tensor, str], QuantizedTensor]
    bound: Callable[[Tensor], Tensor]


def format_of(kind: Kind, group: int = GROUP) -> Format:
    """group: inputs that share a scale, of INT4."""
    if kind == "int8":
        return Format(kind, int8.quantize, int8.bound)
    if kind == "fp8":
        return Format(kind, float8.quantize, float8.bound)
    return Format(kind, partial(int4.quantize, group=group), partial(int4.bound, group=group))
