"""The same quantised weights as two kinds of consumers expect them on disk.

``modelopt``: what NVIDIA ModelOpt exports and TensorRT-LLM reads. ``compressed-tensors``: what
llm-compressor writes and vLLM and transformers read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mtk.errors import ConversionError
from mtk.quantization import compressed_tensors, modelopt
from mtk.quantization.dialect import Dialect
from mtk.quantization.formats import GROUP
from mtk.quantization.tensor import Kind

# By name: the dialect of a format (and group), and that of a ``quantization_config``.
WRITTEN: Mapping[str, Callable[[Kind, int], Dialect]] = {
    "modelopt": modelopt.dialect,
    "compressed-tensors": compressed_tensors.dialect,
}
READ: Mapping[str, Callable[[Mapping[str, Any]], Dialect]] = {
    "modelopt": modelopt.recognise,
    "compressed-tensors": compressed_tensors.recognise,
}
NAMES = tuple(WRITTEN)


def dialect_of(name: str, kind: Kind, group: int = GROUP) -> Dialect:
    """How ``name`` spells weights of a kind."""
    return WRITTEN[name](kind, group)


def recognise(config: Mapping[str, Any]) -> Dialect:
    """The dialect of a ``quantization_config``. Raises ConversionError saying what it is instead,
    if mtk does not read it."""
    method = str(config.get("quant_method"))
    if method not in READ:
        raise ConversionError(f"quant_method {method!r}, not one of {', '.join(READ)}")
    return READ[method](config)
