"""A model whose quantised weights stay as their directory has them.

The table of a family's weights speaks of whole matrices. Its rules rename, split and reorder
rows, and rows are all that values and scales have in common; so both go through the same table,
each in the place of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mtk.checkpoint.load import copy_into
from mtk.config.model import ModelConfig
from mtk.convert.hf_directory import HfModel, read_hf_model
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.mapping import check_complete
from mtk.errors import ConversionError
from mtk.models.buffers import kept_tensors
from mtk.models.build import build_on_meta
from mtk.models.gpt import GPT
from mtk.quantization.directory import StoredWeights, dequantized, open_stored
from mtk.quantization.linear import QuantizedLinear
from mtk.quantization.tensor import STORED, QuantizedTensor


@dataclass(frozen=True)
class _Parts:
    """Native weights by name: of quantised ones values and scales, and the input's factors by the
    foreign module they come from."""

    values: Tensors
    scales: Tensors
    layers: Mapping[str, str]


def load_quantized(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[GPT, ModelConfig]:
    """The model of a directory in eval mode, its quantised matrices as :class:`QuantizedLinear`;
    all else in ``dtype``. Raises ConversionError."""
    stored = open_stored(folder)
    found = read_hf_model(folder, dequantized(folder))
    parts = _native_parts(found, stored)
    model = build_on_meta(found.config).to(dtype)
    shapes = {name: tensor.shape for name, tensor in kept_tensors(model).items()}
    check_complete(parts.values, shapes, f"model in {folder}")
    for name in parts.layers:
        _put(model, name, nn.Identity())
    model = model.to_empty(device=device)
    model.fill_tables(torch.device(device))
    for name, parameter in kept_tensors(model).items():
        copy_into(parameter, parts.values[name], name, folder)
    for name in parts.layers:
        q, bias = _weight(name, parts, stored), name.removesuffix("weight") + "bias"
        if q.values_OI.shape != shapes[name]:
            raise ConversionError(
                f"{folder}: {parts.layers[name]}weight makes {name} of shape "
                f"{list(q.values_OI.shape)}, config.json asks for {list(shapes[name])}."
            )
        held = parts.values[bias].to(dtype) if bias in shapes else None
        _put(model, name, QuantizedLinear.of(q, held).to(device))
    return model.eval(), found.config


def _native_parts(found: HfModel, stored: StoredWeights) -> _Parts:
    table = found.family.weights(found.config)

    def view(part: Callable[[QuantizedTensor], Tensor]) -> Tensors:
        def read(name: str) -> Tensor:
            layer = name.removesuffix("weight")
            if layer in stored.layers and name.endswith("weight"):
                return part(stored.quantized(layer))
            return found.tensors[name]

        return table.as_native(LazyTensors(found.tensors, read), f"files in {found.folder}")

    layers: dict[str, str] = {}
    for rule in table.rules:
        foreign = rule.foreigns[0].removesuffix("weight")
        if foreign in stored.layers and len(rule.foreigns) == 1:
            layers |= dict.fromkeys(rule.natives, foreign)
    # FP8 as bytes: not all that rules do is known of it.
    values = view(lambda q: q.values_OI.view(torch.int8))
    return _Parts(values, view(lambda q: q.scale_OG), layers)


def _weight(name: str, parts: _Parts, stored: StoredWeights) -> QuantizedTensor:
    kind = stored.dialect.kind
    factors = stored.quantized(parts.layers[name]).input_I
    return QuantizedTensor(kind, parts.values[name].view(STORED[kind]), parts.scales[name], factors)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """``layer`` in the place of the one whose weight is ``name``."""
    home, _, child = name.removesuffix(".weight").rpartition(".")
    setattr(model.get_submodule(home), child, layer)
