"""Directories in the format of compressed-tensors 0.20, for vLLM and transformers.

| kind | preset | format | tensors |
|---|---|---|---|
| INT8 | W8A16 | pack-quantized | weight_packed int32 [O, I / 4], weight_scale [O, 1] |
| FP8 | FP8_DYNAMIC | float-quantized | weight e4m3 [O, I], weight_scale [O, 1] |
| FP8, read only | FP8, W8A16 | float-quantized | weight_scale [1] or [O, 1], maybe input_scale |
| INT4 | W4A16 | pack-quantized | weight_packed int32 [O, I / 8], weight_scale [O, I / group] |

Packed values are stored plus half their range, the first input in the lowest bits, beside
weight_shape, int64 [2]. INT8 has one scale a channel (the preset: one a group). FP8_DYNAMIC
asks consumers to round activations too, of each token when it comes; mtk computes with
activations as they are.

Shape suffixes: O outputs, I inputs, W 32-bit words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.errors import ConversionError
from mtk.quantization.dialect import Dialect, Parts, require_shape
from mtk.quantization.formats import GROUP
from mtk.quantization.tensor import BITS, Kind, QuantizedTensor

# The version of the format that is followed.
VERSION = "0.20.0"
PACKED, FLOAT = "pack-quantized", "float-quantized"
DYNAMIC_TOKENS: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "token",
    "symmetric": True,
    "dynamic": True,
}


def dialect(kind: Kind, group: int = GROUP) -> Dialect:
    """group: inputs that share a scale, of INT4."""
    packed = kind != "fp8"
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    return Dialect(
        name="compressed-tensors",
        kind=kind,
        suffixes=suffixes if packed else ("weight", "weight_scale"),
        encode=_encode_packed if packed else _encode_float,
        decode=partial(_decode_packed, kind) if packed else _decode_float,
        config=partial(_config, kind, group),
        quant_file=lambda ignore: None,
        optional=() if packed else ("input_scale",),
    )


def recognise(config: Mapping[str, Any]) -> Dialect:
    """Raises ConversionError for a scheme that mtk does not read, naming what is other."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConversionError(f"{len(groups or ())} config_groups, not one")
    if config.get("kv_cache_scheme"):
        raise ConversionError("keys and values in fewer bits too, which mtk does not compute")
    group = next(iter(groups.values()))
    group = group if isinstance(group, dict) else {}
    kinds: dict[str, tuple[Kind, ...]] = {PACKED: ("int8", "int4"), FLOAT: ("fp8",)}
    form = str(config.get("format"))
    if form not in kinds:
        raise ConversionError(f"format {form!r}, not {PACKED} or {FLOAT}")
    complaints = {kind: _complaint(kind, group) for kind in kinds[form]}
    fitting = [kind for kind, complaint in complaints.items() if complaint is None]
    if not fitting:
        raise ConversionError("; ".join(f"not {kind}: {why}" for kind, why in complaints.items()))
    return dialect(fitting[0])


def _complaint(kind: Kind, group: Mapping[str, Any]) -> str | None:
    """What keeps a group's scheme from being that of a kind; group sizes are seen in shapes."""
    found = group.get("weights")
    weights: Mapping[str, Any] = found if isinstance(found, dict) else {}
    strategies = {"int8": ("channel",), "fp8": ("channel", "tensor"), "int4": ("group",)}[kind]
    wanted: dict[str, tuple[Any, ...]] = {key: (v,) for key, v in _weights(kind, 0).items()}
    wanted["strategy"] = strategies
    wanted.pop("group_size", None)
    for key, values in wanted.items():
        if weights.get(key) not in values:
            return f"{key} {weights.get(key)!r}, not {' or '.join(map(repr, values))}"
    if weights.get("actorder"):
        return "inputs in another order (actorder)"
    if group.get("input_activations") and kind != "fp8":
        return f"input_activations {group['input_activations']}"
    return None


def _weights(kind: Kind, group: int) -> dict[str, Any]:
    found = {
        "num_bits": BITS[kind],
        "type": "float" if kind == "fp8" else "int",
        "strategy": "group" if kind == "int4" else "channel",
        "symmetric": True,
        "dynamic": False,
    }
    return {**found, "group_size": group} if kind == "int4" else found


def _config(kind: Kind, group: int, ignore: Sequence[str]) -> dict[str, Any]:
    form = FLOAT if kind == "fp8" else PACKED
    scheme = {
        "targets": ["Linear"],
        "format": form,
        "weights": _weights(kind, group),
        "input_activations": dict(DYNAMIC_TOKENS) if kind == "fp8" else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": [name for name in ignore if name == "lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": scheme},
        "version": VERSION,
    }


def _encode_float(q: QuantizedTensor) -> dict[str, Tensor]:
    return {"weight": q.values_OI, "weight_scale": q.scale_OG}


def _decode_float(parts: Parts) -> QuantizedTensor:
    values_OI = parts["weight"]
    outputs = len(values_OI)
    require_shape(parts, "weight_scale", [[outputs, 1], [1], []])
    scale_O1 = parts["weight_scale"].float().reshape(-1, 1).expand(outputs, 1).contiguous()
    return QuantizedTensor("fp8", values_OI, scale_O1)


def _encode_packed(q: QuantizedTensor) -> dict[str, Tensor]:
    outputs, inputs = q.values_OI.shape
    bits = BITS[q.kind]
    each = 32 // bits
    padded = F.pad(q.values_OI, (0, -inputs % each))
    # As bytes of unsigned numbers; a byte of INT4 has two, the first input below.
    bytes_ = (padded.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        bytes_ = bytes_[:, 0::2] | (bytes_[:, 1::2] << 4)
    return {
        "weight_packed": bytes_.contiguous().view(torch.int32),
        "weight_scale": q.scale_OG,
        "weight_shape": torch.tensor([outputs, inputs], dtype=torch.int64),
    }


def _decode_packed(kind: Kind, parts: Parts) -> QuantizedTensor:
    packed_OW, scale = parts["weight_packed"], parts["weight_scale"]
    outputs, inputs = (int(size) for size in parts["weight_shape"])
    bits = BITS[kind]
    words = -(-inputs * bits // 32)
    groups = scale.shape[1] if kind == "int4" and scale.ndim == 2 else 1
    if list(packed_OW.shape) != [outputs, words] or list(scale.shape) != [outputs, groups]:
        raise ConversionError(
            f"weight_shape says [{outputs}, {inputs}], but weight_packed is "
            f"{list(packed_OW.shape)} and weight_scale {list(scale.shape)}."
        )
    bytes_ = packed_OW.contiguous().view(torch.uint8)
    if bits == 4:
        bytes_ = torch.stack([bytes_ & 15, bytes_ >> 4], dim=2).flatten(1)
    values = (bytes_[:, :inputs].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    return QuantizedTensor(kind, values, scale.float())
