"""Quantised Hugging Face directories: which dialect one is, its weights as they are stored or in
full precision, and writing one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtk.convert.hf_directory import read_hf_config, read_weights, write_json
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.errors import ConversionError
from mtk.quantization import dialects
from mtk.quantization.dialect import Dialect
from mtk.quantization.formats import Format
from mtk.quantization.tensor import QuantizedTensor

QUANT_FILE = "hf_quant_config.json"


def find_dialect(folder: Path) -> Dialect:
    """The dialect of a directory. Raises ConversionError for one mtk does not read.

    Where ``hf_quant_config.json`` and ``config.json`` both speak, the file wins, as in
    TensorRT-LLM.
    """
    found = _quantization(folder)
    try:
        return dialects.recognise(found)
    except ConversionError as error:
        raise ConversionError(
            f"{folder} is quantised as {found.get('quant_method')!r}: {error}. This mtk reads "
            f"weights in INT8 and FP8 with one scale a channel, and in INT4 with one a group, of "
            f"modelopt and compressed-tensors."
        ) from error


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


@dataclass(frozen=True)
class StoredWeights:
    """What a quantised directory holds. layers: names of quantised modules, with the dot behind
    them; others: all other weights by name."""

    folder: Path
    dialect: Dialect
    layers: frozenset[str]
    others: Tensors
    stored: Tensors

    def quantized(self, layer: str) -> QuantizedTensor:
        """The weight of one of ``layers``. Raises ConversionError if its parts do not fit."""
        suffixes = (*self.dialect.suffixes, *self.dialect.optional)
        names = {suffix: f"{layer}{suffix}" for suffix in suffixes}
        parts = {suffix: self.stored[name] for suffix, name in names.items() if name in self.stored}
        try:
            return self.dialect.decode(parts)
        except ConversionError as error:
            raise ConversionError(f"{self.folder}: {layer}weight: {error}") from error

    def names(self) -> list[str]:
        """Of all weights, as an ordinary directory has them."""
        return [*self.others, *(f"{layer}weight" for layer in sorted(self.layers))]


def open_stored(folder: Path) -> StoredWeights:
    """Raises ConversionError for a directory mtk does not read, or that lacks tensors."""
    dialect, stored = find_dialect(folder), read_weights(folder)
    marker = dialect.suffixes[-1]
    layers = {name.removesuffix(marker) for name in stored if name.endswith(f".{marker}")}
    if not layers:
        raise ConversionError(f"{folder} says it is {dialect.name}, but no weight is quantised.")
    parts = {f"{layer}{suffix}" for layer in layers for suffix in dialect.suffixes}
    missing = sorted(parts - set(stored))[:5]
    if missing:
        raise ConversionError(f"{folder} lacks {', '.join(missing)} (first five).")
    parts |= {f"{layer}{suffix}" for layer in layers for suffix in dialect.optional}
    names = [name for name in stored if name not in parts]

    def read(name: str) -> Tensor:
        tensor = stored[name]
        narrow = not tensor.is_floating_point() or tensor.element_size() == 1
        if name.endswith(".weight") and narrow:
            raise ConversionError(
                f"{folder}: {name} is {tensor.dtype}, but there is no "
                f"{name.removesuffix('weight')}{marker}."
            )
        return tensor

    others = LazyTensors(names, read)
    return StoredWeights(folder, dialect, frozenset(layers), others, stored)


def dequantized(folder: Path) -> Tensors:
    """All weights under their ordinary names; quantised ones as fp32. Raises ConversionError."""
    found = open_stored(folder)

    def read(name: str) -> Tensor:
        layer = name.removesuffix("weight")
        if layer in found.layers and name.endswith("weight"):
            return found.quantized(layer).dequantize()
        return found.others[name]

    return LazyTensors(found.names(), read)


def quantized(
    tensors: Tensors, linears: tuple[str, ...], dialect: Dialect, format_: Format
) -> Tensors:
    """A view of ``tensors`` in which the weights of ``linears`` are rounded and in a dialect.

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
        return dialect.encode(rounded(tensors, weight, format_))[suffix]

    return LazyTensors(origin, read)


def rounded(tensors: Tensors, name: str, format_: Format) -> QuantizedTensor:
    return format_.quantize(tensors[name], name)


def write_quant_file(folder: Path, dialect: Dialect, ignore: tuple[str, ...]) -> None:
    """``hf_quant_config.json``, where the dialect has one."""
    content = dialect.quant_file(ignore)
    if content is not None:
        write_json(folder / QUANT_FILE, content)
