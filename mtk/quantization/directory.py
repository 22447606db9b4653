"""Quantised Hugging Face directories: which dialect one is, its weights in full precision,
and writing one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtk.convert.hf_directory import read_hf_config, read_weights, write_json
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.errors import ConversionError
from mtk.quantization.dialects import DIALECTS, Dialect
from mtk.quantization.int8 import QuantizedTensor, quantize

QUANT_FILE = "hf_quant_config.json"


def find_dialect(folder: Path) -> Dialect:
    """The dialect of a directory. Raises ConversionError for one mtk does not read.

    Where ``hf_quant_config.json`` and ``config.json`` both speak, the file wins, as in
    TensorRT-LLM.
    """
    found = _quantization(folder)
    dialect = DIALECTS.get(str(found.get("quant_method")))
    complaint = "not one of " + ", ".join(DIALECTS) if dialect is None else dialect.mismatch(found)
    if dialect is None or complaint is not None:
        raise ConversionError(
            f"{folder} is quantised as {found.get('quant_method')!r}: {complaint}. This mtk reads "
            f"INT8 weight-only, one scale a channel, of modelopt and compressed-tensors."
        )
    return dialect


def _quantization(folder: Path) -> Mapping[str, Any]:
    path = folder / QUANT_FILE
    if path.is_file():
        try:
            return {
                "quant_method": "modelopt",
                **json.loads(path.read_text("utf-8"))["quantization"],
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{path} cannot be read: {error!r}.") from error
    found = read_hf_config(folder).get("quantization_config")
    if not isinstance(found, dict):
        raise ConversionError(f"{folder}/config.json: quantization_config is not an object.")
    return found


def dequantized(folder: Path) -> Tensors:
    """All weights under their ordinary names; quantised ones as fp32. Raises ConversionError."""
    dialect = find_dialect(folder)
    stored = read_weights(folder)
    marker = dialect.suffixes[-1]
    layers = {name.removesuffix(marker) for name in stored if name.endswith(f".{marker}")}
    if not layers:
        raise ConversionError(f"{folder} says it is {dialect.name}, but no weight is quantised.")
    parts = {f"{layer}{suffix}" for layer in layers for suffix in dialect.suffixes}
    missing = sorted(parts - set(stored))[:5]
    if missing:
        raise ConversionError(f"{folder} lacks {', '.join(missing)} (first five).")
    names = [name for name in stored if name not in parts]
    names += [f"{layer}weight" for layer in sorted(layers)]

    def read(name: str) -> Tensor:
        layer = name.removesuffix("weight")
        if layer not in layers or not name.endswith("weight"):
            return stored[name]
        found = {suffix: stored[f"{layer}{suffix}"] for suffix in dialect.suffixes}
        try:
            return dialect.decode(found).dequantize()
        except ConversionError as error:
            raise ConversionError(f"{folder}: {name}: {error}") from error

    return LazyTensors(names, read)


def quantized(tensors: Tensors, linears: tuple[str, ...], dialect: Dialect) -> Tensors:
    """A view of ``tensors`` in which the weights of ``linears`` are INT8 in a dialect.

    linears: endings of module names, e.g. ``self_attn.q_proj``.
    """
    origin: dict[str, tuple[str, str | None]] = {}
    for name in tensors:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(linears):
            for suffix in dialect.suffixes:
                origin[f"{module}.{suffix}"] = (name, suffix)
        else:
            origin[name] = (name, None)

    def read(name: str) -> Tensor:
        weight, suffix = origin[name]
        if suffix is None:
            return tensors[weight]
        return dialect.encode(int8_of(tensors, weight))[suffix]

    return LazyTensors(origin, read)


def int8_of(tensors: Tensors, name: str) -> QuantizedTensor:
    return quantize(tensors[name], name)


def write_quant_file(folder: Path, dialect: Dialect, ignore: tuple[str, ...]) -> None:
    """``hf_quant_config.json``, where the dialect has one."""
    content = dialect.quant_file(ignore)
    if content is not None:
        write_json(folder / QUANT_FILE, content)
