"""The same INT8 weights as two kinds of consumers expect them on disk.

``modelopt``: what NVIDIA ModelOpt exports and TensorRT-LLM reads (quant_algo W8A16).
``compressed-tensors``: what llm-compressor writes and vLLM and transformers read
(pack-quantized, 8 bits, one scale a channel).

Shape suffixes: O outputs, I inputs, W 32-bit words of four inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk import __version__
from mtk.errors import ConversionError
from mtk.quantization.int8 import QuantizedTensor

PRODUCER: Mapping[str, str] = {"name": "mtk", "version": __version__}
# The version of the compressed-tensors format that is followed.
COMPRESSED_TENSORS = "0.20.0"


@dataclass(frozen=True)
class Dialect:
    """suffixes: what replaces ``weight`` in the names of a quantised layer's tensors.

    encode(q) and decode(parts): tensors by suffix. config(ignore): the
    ``quantization_config`` of ``config.json``; quant_file(ignore): the content of
    ``hf_quant_config.json`` or None. mismatch(config): None if ``config`` is exactly
    this dialect, else what it is instead.
    """

    name: str
    suffixes: tuple[str, ...]
    encode: Callable[[QuantizedTensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor]], QuantizedTensor]
    config: Callable[[Sequence[str]], dict[str, Any]]
    quant_file: Callable[[Sequence[str]], dict[str, Any] | None]
    mismatch: Callable[[Mapping[str, Any]], str | None]


def _modelopt_encode(q: QuantizedTensor) -> dict[str, Tensor]:
    return {"weight": q.values_OI, "weight_scale": q.scale_O}


def _modelopt_decode(parts: Mapping[str, Tensor]) -> QuantizedTensor:
    return QuantizedTensor(parts["weight"], parts["weight_scale"])


def _modelopt_config(ignore: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": "W8A16",
        "ignore": list(ignore),
        "producer": dict(PRODUCER),
    }


def _modelopt_file(ignore: Sequence[str]) -> dict[str, Any]:
    return {
        "producer": dict(PRODUCER),
        "quantization": {
            "quant_algo": "W8A16",
            "kv_cache_quant_algo": None,
            "exclude_modules": list(ignore),
        },
    }


def _modelopt_mismatch(config: Mapping[str, Any]) -> str | None:
    algo = config.get("quant_algo")
    return None if algo == "W8A16" else f"quant_algo {algo!r}, not W8A16"


def _packed_encode(q: QuantizedTensor) -> dict[str, Tensor]:
    outputs, inputs = q.values_OI.shape
    padded = F.pad(q.values_OI, (0, -inputs % 4))
    # Byte k of a word is input 4w + k, stored plus 128, so words are read as unsigned.
    bytes_OI = (padded.to(torch.int16) + 128).to(torch.uint8)
    return {
        "weight_packed": bytes_OI.contiguous().view(torch.int32),
        "weight_scale": q.scale_O[:, None].contiguous(),
        "weight_shape": torch.tensor([outputs, inputs], dtype=torch.int64),
    }


def _packed_decode(parts: Mapping[str, Tensor]) -> QuantizedTensor:
    packed_OW, scale = parts["weight_packed"], parts["weight_scale"]
    outputs, inputs = (int(size) for size in parts["weight_shape"])
    words = -(-inputs // 4)
    if list(packed_OW.shape) != [outputs, words] or list(scale.shape) != [outputs, 1]:
        raise ConversionError(
            f"weight_shape says [{outputs}, {inputs}], but weight_packed is "
            f"{list(packed_OW.shape)} and weight_scale {list(scale.shape)}."
        )
    bytes_OI = packed_OW.contiguous().view(torch.uint8)[:, :inputs]
    return QuantizedTensor((bytes_OI.to(torch.int16) - 128).to(torch.int8), scale[:, 0].float())


def _packed_config(ignore: Sequence[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 8,
        "type": "int",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
    }
    scheme = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in ignore if name == "lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": scheme},
        "version": COMPRESSED_TENSORS,
    }


def _packed_mismatch(config: Mapping[str, Any]) -> str | None:
    groups = config.get("config_groups")
    if config.get("format") != "pack-quantized" or not isinstance(groups, dict):
        return f"format {config.get('format')!r}, not pack-quantized"
    wanted = _packed_config(())["config_groups"]["group_0"]["weights"]
    for group in groups.values():
        group = group if isinstance(group, dict) else {}
        weights, activations = group.get("weights"), group.get("input_activations")
        weights = weights if isinstance(weights, dict) else {}
        other = {key: weights.get(key) for key in wanted if weights.get(key) != wanted[key]}
        if other or activations:
            return f"weights {other or weights}, input_activations {activations}"
    return None


MODELOPT = Dialect(
    name="modelopt",
    suffixes=("weight", "weight_scale"),
    encode=_modelopt_encode,
    decode=_modelopt_decode,
    config=_modelopt_config,
    quant_file=_modelopt_file,
    mismatch=_modelopt_mismatch,
)
PACKED = Dialect(
    name="compressed-tensors",
    suffixes=("weight_packed", "weight_scale", "weight_shape"),
    encode=_packed_encode,
    decode=_packed_decode,
    config=_packed_config,
    quant_file=lambda ignore: None,
    mismatch=_packed_mismatch,
)
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (MODELOPT, PACKED)}
