"""What a dialect is: names, types and shapes of a quantised layer's tensors on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtk.errors import ConversionError
from mtk.quantization.tensor import Kind, QuantizedTensor

# Of a dialect's tensors: by the suffix that takes the place of ``weight`` in a name.
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Dialect:
    """How weights of one kind are spelt.

    suffixes: what replaces ``weight`` in the names of a quantised layer's tensors. optional: what
    may be there besides when it is read. encode(q) and decode(parts): tensors by suffix; decode
    raises ConversionError for parts that do not fit each other. config(ignore): the
    ``quantization_config`` of ``config.json``; quant_file(ignore): the content of
    ``hf_quant_config.json``, or None.
    """

    name: str
    kind: Kind
    suffixes: tuple[str, ...]
    encode: Callable[[QuantizedTensor], dict[str, Tensor]]
    decode: Callable[[Parts], QuantizedTensor]
    config: Callable[[Sequence[str]], dict[str, Any]]
    quant_file: Callable[[Sequence[str]], dict[str, Any] | None]
    optional: tuple[str, ...] = ()


def require_shape(parts: Parts, suffix: str, shapes: Sequence[Sequence[int]]) -> None:
    """Raises ConversionError unless a part has one of ``shapes``."""
    found = list(parts[suffix].shape)
    if found not in [list(shape) for shape in shapes]:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        beside = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
        raise ConversionError(f"{suffix} is {found}, not {wanted} (of {beside})")
