"""How versions of Megatron spell the same weight, as data; all are read under one name.

The one name is that of Megatron-core's local layers. Three others exist: Megatron up to 2.x
(nested dicts, ``language_model.transformer`` or ``.encoder``, ``query_key_value``,
``dense_h_to_4h``), its Transformer Engine variant, and core with norms fused into linears.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtk.convert.megatron.pickles import StoredTensor
from mtk.errors import ConversionError

DEPTH = 8
PREFIXES = (
    ("language_model.embedding.", "embedding."),
    ("language_model.transformer.", "decoder."),
    ("language_model.encoder.", "decoder."),
    ("language_model.output_layer.", "output_layer."),
    ("language_model.pooler.", "pooler."),
    ("word_embeddings_for_head.", "output_layer."),
)
FINAL = (("decoder.final_norm.", "decoder.final_layernorm."),)
# Beginnings of what follows ``decoder.layers.N.``; the first that fits.
IN_LAYER = (
    ("input_norm.", "input_layernorm."),
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.layernorm_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.layernorm_qkv.", "self_attention.linear_qkv."),
    ("self_attention.query_key_value.", "self_attention.linear_qkv."),
    ("attention.query_key_value.", "self_attention.linear_qkv."),
    ("self_attention.dense.", "self_attention.linear_proj."),
    ("self_attention.proj.", "self_attention.linear_proj."),
    ("attention.dense.", "self_attention.linear_proj."),
    ("post_attention_layernorm.", "pre_mlp_layernorm."),
    ("post_attention_norm.", "pre_mlp_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("layernorm_mlp.layer_norm_", "pre_mlp_layernorm."),
    ("layernorm_mlp.fc1_", "mlp.linear_fc1."),
    ("layernorm_mlp.fc2_", "mlp.linear_fc2."),
    ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
    ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
)
# State of FP8 and tables of rotary frequencies: nothing that was learnt.
WITHOUT_WEIGHTS = ("_extra_state", "rotary_pos_emb.inv_freq", "rotary_emb.inv_freq")
LAYER = re.compile(r"decoder\.layers\.(\d{1,5})\.(.+)")
# One matrix an expert, numbered within the rank's experts.
EXPERTS = (
    re.compile(r"mlp\.experts\.local_experts\.(\d{1,5})\.linear_fc([12])\.weight"),
    re.compile(r"mlp\.experts\.linear_fc(?P<fc>[12])\.weight(?P<number>\d{1,5})"),
)
# All experts of a rank in one matrix, transposed.
GROUPED = re.compile(r"mlp\.experts\.weight([12])")
# Parts only other models have.
FOREIGN = (
    ("language_model.decoder.", "a T5"),
    ("inter_attention", "a T5"),
    ("cross_attention", "a T5"),
    ("mixer.", "a Mamba"),
)


@dataclass(frozen=True)
class Found:
    """A tensor of one rank. layer: as numbered within its stage. expert: within its rank;
    None for all of them or where there are none. grouped: stored as GroupedMLP does."""

    raw: str
    name: str
    layer: int | None
    tensor: StoredTensor
    expert: int | None = None
    grouped: bool = False


def flatten(model: Any, where: str, prefix: str = "", depth: int = 0) -> dict[str, StoredTensor]:
    """Nested dicts of tensors as one dict with dotted names. Raises ConversionError."""
    if not isinstance(model, Mapping) or depth > DEPTH:
        raise ConversionError(f"{where}: {prefix or 'the model'} is no dict of tensors.")
    found: dict[str, StoredTensor] = {}
    for key, value in model.items():
        if not isinstance(key, str):
            raise ConversionError(f"{where}: {prefix}{key!r:.40} is no name of a tensor.")
        name = f"{prefix}{key}"
        if name.endswith(WITHOUT_WEIGHTS):
            continue
        more = {name: value} if isinstance(value, StoredTensor) else None
        more = flatten(value, where, f"{name}.", depth + 1) if more is None else more
        twice = found.keys() & more.keys()
        if twice:
            raise ConversionError(f"{where} holds {min(twice)} twice, in dicts of unlike depth.")
        found |= more
    return found


def spelled(raw: str, tensor: StoredTensor) -> Found:
    """What ``raw`` means; a name not known keeps its spelling and will have no place."""
    name = _replaced(_replaced(raw, PREFIXES), FINAL)
    match = LAYER.fullmatch(name)
    if match is None:
        return Found(raw, name, None, tensor)
    layer, part = int(match[1]), _replaced(match[2], IN_LAYER)
    for pattern in EXPERTS:
        expert = pattern.fullmatch(part)
        if expert is not None:
            named = expert.groupdict() or {"number": expert[1], "fc": expert[2]}
            stack = f"mlp.experts.linear_fc{named['fc']}.weight"
            return Found(raw, stack, layer, tensor, expert=int(named["number"]))
    grouped = GROUPED.fullmatch(part)
    if grouped is not None:
        stack = f"mlp.experts.linear_fc{grouped[1]}.weight"
        return Found(raw, stack, layer, tensor, grouped=True)
    return Found(raw, part, layer, tensor)


def refuse_other_models(names: Mapping[str, object], where: str) -> None:
    """Raises ConversionError for a model that is neither GPT nor BERT."""
    for part, model in FOREIGN:
        hits = [name for name in names if part in name]
        if hits:
            raise ConversionError(
                f"{where} holds {model} model ({hits[0]}); of Megatron's models mtk converts GPT "
                f"and BERT."
            )


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
