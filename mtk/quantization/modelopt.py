"""Directories as NVIDIA ModelOpt exports them, for TensorRT-LLM (and, of FP8, vLLM).

| kind | quant_algo | weight | weight_scale |
|---|---|---|---|
| INT8 | W8A16 | int8 [O, I] | fp32 [O] |
| FP8 | FP8_PER_CHANNEL_PER_TOKEN | e4m3 [O, I] | fp32 [O] |
| FP8, read only | FP8 | e4m3 [O, I] | fp32 [] |
| INT4 | W4A16_AWQ | uint8 [O / 2, I]: rows 2r (low nibble) and 2r + 1 | fp32 [O, I / group] |

With FP8 their consumers round activations too (of each token when it comes, or by the
``input_scale`` of the layer); mtk computes with activations as they are. AWQ's
``pre_quant_scale`` is read where a layer has one; mtk searches none and writes none.

Shape suffixes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtk import __version__
from mtk.errors import ConversionError
from mtk.quantization.dialect import Dialect, Parts, require_shape
from mtk.quantization.formats import GROUP
from mtk.quantization.tensor import Kind, QuantizedTensor

PRODUCER: Mapping[str, str] = {"name": "mtk", "version": __version__}
ALGORITHMS: Mapping[Kind, str] = {
    "int8": "W8A16",
    "fp8": "FP8_PER_CHANNEL_PER_TOKEN",
    "int4": "W4A16_AWQ",
}
# Algorithms whose weights are spelt alike, or a scalar where others have a vector.
READ: Mapping[str, Kind] = {**{algo: kind for kind, algo in ALGORITHMS.items()}, "FP8": "fp8"}


def dialect(kind: Kind, group: int = GROUP) -> Dialect:
    """group: inputs that share a scale, of INT4."""
    return Dialect(
        name="modelopt",
        kind=kind,
        suffixes=("weight", "weight_scale"),
        encode=_encode_int4 if kind == "int4" else _encode_bytes,
        decode=_decode_int4 if kind == "int4" else partial(_decode_bytes, kind),
        config=partial(_config, kind),
        quant_file=partial(_file, kind, group),
        optional={"int4": ("pre_quant_scale",), "fp8": ("input_scale",), "int8": ()}[kind],
    )


def recognise(config: Mapping[str, Any]) -> Dialect:
    """Raises ConversionError for an algorithm that mtk does not read."""
    algo = str(config.get("quant_algo"))
    if algo not in READ:
        raise ConversionError(f"quant_algo {algo!r}, not one of {', '.join(READ)}")
    if config.get("has_zero_point"):
        raise ConversionError("weights with zero points (has_zero_point)")
    if config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme"):
        raise ConversionError("keys and values in fewer bits too, which mtk does not compute")
    return dialect(READ[algo])


def _encode_bytes(q: QuantizedTensor) -> dict[str, Tensor]:
    return {"weight": q.values_OI, "weight_scale": q.scale_OG[:, 0].contiguous()}


def _decode_bytes(kind: Kind, parts: Parts) -> QuantizedTensor:
    values_OI, scale = parts["weight"], parts["weight_scale"]
    require_shape(parts, "weight_scale", [values_OI.shape[:1]] + [[], [1]] * (kind == "fp8"))
    scale_O1 = scale.float().reshape(-1, 1).expand(len(values_OI), 1).contiguous()
    return QuantizedTensor(kind, values_OI, scale_O1)


def _encode_int4(q: QuantizedTensor) -> dict[str, Tensor]:
    nibbles = q.values_OI.view(torch.uint8) & 15
    return {
        "weight": (nibbles[0::2] | (nibbles[1::2] << 4)).contiguous(),
        "weight_scale": q.scale_OG,
    }


def _decode_int4(parts: Parts) -> QuantizedTensor:
    packed, scale_OG = parts["weight"], parts["weight_scale"]
    if packed.dtype != torch.uint8 or packed.ndim != 2 or scale_OG.ndim != 2:
        found = f"{packed.dtype} {list(packed.shape)}, scales {list(scale_OG.shape)}"
        raise ConversionError(f"weight is {found}, not uint8 [out / 2, in] and [out, groups]")
    bytes_ = packed.view(torch.int8)
    # In two's complement: shifts to the left and back spread the sign.
    both = torch.stack([(bytes_ << 4) >> 4, bytes_ >> 4], dim=1)
    factors = parts.get("pre_quant_scale")
    return QuantizedTensor(
        "int4", both.flatten(0, 1), scale_OG.float(), None if factors is None else factors.float()
    )


def _config(kind: Kind, ignore: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": ALGORITHMS[kind],
        "ignore": list(ignore),
        "producer": dict(PRODUCER),
    }


def _file(kind: Kind, group: int, ignore: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"quant_algo": ALGORITHMS[kind], "kv_cache_quant_algo": None}
    if kind == "int4":
        found |= {"group_size": group, "has_zero_point": False, "pre_quant_scale": False}
    found["exclude_modules"] = list(ignore)
    return {"producer": dict(PRODUCER), "quantization": found}
