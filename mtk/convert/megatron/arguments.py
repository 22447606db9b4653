"""Megatron's arguments to a native configuration.

Names and defaults are those of Megatron's command line; files of old versions spell some
differently. All complaints come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtk.config.layer_pattern import as_text
from mtk.config.model import ModelConfig
from mtk.convert.family import ForeignConfig
from mtk.convert.megatron.argument_tables import (
    BALANCING,
    HARMLESS,
    NEUTRAL,
    OTHER_TASKS,
    SOUNDS_LIKE_THE_MODEL,
    words,
)
from mtk.convert.megatron.bert import bert_values

# Read by name below; ranks of one checkpoint must agree about these and about NEUTRAL.
READ = words(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention
    num_query_groups kv_channels seq_length max_position_embeddings position_embedding_type
    use_rotary_position_embeddings rotary_base rotary_percent normalization norm_epsilon
    layernorm_epsilon add_bias_linear disable_bias_linear add_qkv_bias swiglu squared_relu
    openai_gelu bias_gelu_fusion onnx_safe untie_embeddings_and_output_weights hidden_dropout
    attention_dropout init_method_std num_experts moe_router_topk moe_ffn_hidden_size
    moe_layer_freq moe_aux_loss_coeff moe_z_loss_coeff moe_router_pre_softmax
    moe_router_load_balancing_type vocab_size padded_vocab_size make_vocab_size_divisible_by
    apply_layernorm_1p layernorm_zero_centered_gamma
    qk_layernorm window_size rotary_interleaved use_rope_scaling
    rope_scaling_factor moe_router_score_function moe_router_enable_expert_bias
    moe_router_bias_update_rate moe_router_num_groups moe_router_group_topk
    moe_router_topk_scaling_factor moe_shared_expert_intermediate_size moe_shared_expert_gate
    tokenizer_type true_vocab_size true_rope_scaling_factor tensor_model_parallel_size
    model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size virtual_pipeline_model_parallel_size bert_binary_head
    """
)
COMPARED = READ | {name for name, _, _ in NEUTRAL}
POSITIONS = {"learned_absolute": "learned", "absolute": "learned", "rope": "rope", "none": "none"}
# What Megatron scales rotary frequencies by.
MEGATRON_FACTOR = 8.0
# A table of all positions is held in memory; layers are gone through one by one.
MOST = {"max_position_embeddings": 2**24, "num_layers": 99_999}
# Megatron's own values where a file of an old version does not state them.
DROPOUT, EPSILON, INIT_STD = 0.1, 1e-5, 0.02


def model_config(
    args: Mapping[str, Any], where: str, *, rows: int, segments: int | None = None
) -> ModelConfig:
    """The native configuration. rows: of the embedding in the files, all ranks together.
    segments: kinds of them in a BERT; None for a GPT.

    Raises ConversionError with everything mtk cannot hold.
    """
    found = ForeignConfig(args, where)
    for name, allowed, why in NEUTRAL:
        if args.get(name) is not None:
            found.require(name, allowed, why)
    found.complaints += [
        _unknown(name, args[name]) for name in sorted(args) if _suspect(args, name)
    ]
    hidden, heads = found.get("hidden_size", int), found.get("num_attention_heads", int)
    positions = found.get("max_position_embeddings", int)
    for name, most in MOST.items():
        if found.get(name, int, 1) > most:
            found.complaints.append(f"{name} = {found.data[name]}: mtk's models have up to {most}")
    values: dict[str, Any] = {
        "num_layers": found.get("num_layers", int),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": _groups(found, heads),
        "ffn_hidden_size": found.get("ffn_hidden_size", int, 4 * hidden),
        "kv_channels": found.get("kv_channels", int, max(hidden // max(heads, 1), 1)),
        "seq_length": min(found.get("seq_length", int, positions), positions),
        "max_position_embeddings": positions,
        "normalization": found.get("normalization", str, "LayerNorm"),
        "norm_epsilon": found.get(
            "norm_epsilon", float, found.get("layernorm_epsilon", float, EPSILON)
        ),
        "add_bias_linear": _bias(found),
        "add_qkv_bias": found.get("add_qkv_bias", bool, False),
        "apply_layernorm_1p": _zero_centred(found),
        "qk_layernorm": found.get("qk_layernorm", bool, False),
        "window_size": _window(found),
        "untie_embeddings_and_output_weights": found.get(
            "untie_embeddings_and_output_weights", bool, False
        ),
        "hidden_dropout": found.get("hidden_dropout", float, DROPOUT),
        "attention_dropout": found.get("attention_dropout", float, DROPOUT),
        "init_method_std": found.get("init_method_std", float, INIT_STD),
        "vocab_size": _vocabulary(found, rows),
        "make_vocab_size_divisible_by": _padding_unit(found, rows),
    }
    values |= _positions(found)
    values |= _experts(found)
    values["activation"] = _activation(found, bias=values["add_bias_linear"])
    if segments is not None:
        values |= bert_values(found, segments)
    return found.model(**values)


def true_vocabulary(args: Mapping[str, Any], rows: int) -> int:
    """Ids that exist among ``rows``; all of them where nobody says otherwise."""
    if args.get("true_vocab_size") is not None:
        return int(args["true_vocab_size"])
    stated = args.get("vocab_size")
    if not isinstance(stated, int):
        return rows
    # Megatron's tokenizer without text has an end-of-document id beyond those it is given.
    return stated + 1 if args.get("tokenizer_type") == "NullTokenizer" else stated


def _vocabulary(found: ForeignConfig, rows: int) -> int:
    padded = found.data.get("padded_vocab_size")
    if isinstance(padded, int) and padded != rows:
        found.complaints.append(f"padded_vocab_size = {padded}, but the embedding has {rows} rows")
    for name in ("true_vocab_size", "vocab_size"):
        if type(found.data.get(name)) not in (int, type(None)):
            found.complaints.append(f"{name} = {found.data[name]!r:.40} is not of type int")
            return rows
    vocab = true_vocabulary(found.data, rows)
    if not 1 <= vocab <= rows:
        found.complaints.append(
            f"a vocabulary of {vocab} in an embedding of {rows} rows; say the true one with "
            f"--true-vocab-size"
        )
        return rows
    return vocab


def _padding_unit(found: ForeignConfig, rows: int) -> int:
    unit = found.get("make_vocab_size_divisible_by", int, 128)
    if unit > rows and "make_vocab_size_divisible_by" in found.data:
        found.complaints.append(
            f"make_vocab_size_divisible_by = {unit}, but the embedding has {rows} rows"
        )
        return 128
    return unit


def _groups(found: ForeignConfig, heads: int) -> int:
    # num_query_groups is 1 by default and means nothing without the switch.
    if found.get("group_query_attention", bool, False):
        return found.get("num_query_groups", int)
    return heads


def _zero_centred(found: ForeignConfig) -> bool:
    """The option's name, or that of Megatron-core's configuration; either switches it on."""
    option = found.get("apply_layernorm_1p", bool, False)
    return found.get("layernorm_zero_centered_gamma", bool, False) or option


def _bias(found: ForeignConfig) -> bool:
    if "add_bias_linear" not in found.data and "disable_bias_linear" in found.data:
        return not found.get("disable_bias_linear", bool, False)
    return found.get("add_bias_linear", bool, True)


def _positions(found: ForeignConfig) -> dict[str, Any]:
    rotary = found.get("use_rotary_position_embeddings", bool, False)
    kind = "rope" if rotary else found.get("position_embedding_type", str, "learned_absolute")
    if kind not in POSITIONS:
        found.complaints.append(
            f"position_embedding_type = {kind!r}: supported are {', '.join(POSITIONS)}"
        )
        kind = "none"
    values: dict[str, Any] = {"position_embedding_type": POSITIONS[kind]}
    if kind == "rope":
        values["rotary_base"] = found.get("rotary_base", float, 10000.0)
        values["rotary_percent"] = found.get("rotary_percent", float, 1.0)
        values["rotary_interleaved"] = found.get("rotary_interleaved", bool, False)
        values |= _scaling(found)
    return values


def _scaling(found: ForeignConfig) -> dict[str, Any]:
    """Llama 3's scaled frequencies, the only kind Megatron's GPT has."""
    if not found.get("use_rope_scaling", bool, False):
        return {}
    stated = found.get("rope_scaling_factor", float, MEGATRON_FACTOR)
    factor = found.get("true_rope_scaling_factor", float, stated)
    if factor != MEGATRON_FACTOR and "true_rope_scaling_factor" not in found.data:
        found.complaints.append(
            f"rope_scaling_factor = {stated:g}: until August 2026 Megatron computed with "
            f"{MEGATRON_FACTOR:g} whatever it was told; say what this model was trained with by "
            f"true_rope_scaling_factor in a file with --megatron-args"
        )
    return {"rope_scaling_type": "llama3", "rope_scaling_factor": factor}


def _window(found: ForeignConfig) -> int | None:
    """Megatron counts the tokens before a token, mtk the token itself too."""
    value = found.data.get("window_size")
    if value is None:
        return None
    sizes = list(value) if isinstance(value, list | tuple) else []
    if len(sizes) == 2 and type(sizes[0]) is int and sizes[0] >= 0 and sizes[1] == 0:
        return sizes[0] + 1
    found.complaints.append(
        f"window_size = {value!r:.40}: supported is (N, 0), the N tokens before and none after"
    )
    return None


def _activation(found: ForeignConfig, *, bias: bool) -> str:
    kinds = {"swiglu": "swiglu", "squared_relu": "squared-relu", "openai_gelu": "gelu-tanh"}
    chosen = [native for name, native in kinds.items() if found.get(name, bool, False)]
    if len(chosen) > 1:
        found.complaints.append(f"activations {' and '.join(chosen)} at once")
    if chosen:
        return chosen[0]
    # Fused with the bias, gelu is its tanh approximation; else it is exact.
    fused = bias and found.get("bias_gelu_fusion", bool)
    return "gelu-tanh" if fused else "gelu"


def _experts(found: ForeignConfig) -> dict[str, Any]:
    count = found.get("num_experts", int, 0)
    if not count:
        return {}
    topk = found.get("moe_router_topk", int, 2)
    score = found.get("moe_router_score_function", str, "softmax")
    first = found.get("moe_router_pre_softmax", bool, False) and score == "softmax"
    if topk == 1 and score == "softmax" and not first:
        found.complaints.append(
            "moe_router_topk = 1 without moe_router_pre_softmax: weights that do not depend on "
            "the router are not supported"
        )
    balancing = found.data.get("moe_router_load_balancing_type") or "aux_loss"
    kinds = balancing if isinstance(balancing, list) else [balancing]
    if any(kind not in BALANCING for kind in kinds):
        found.complaints.append(
            f"moe_router_load_balancing_type = {balancing!r}: supported are {', '.join(BALANCING)}"
        )
    biased = found.get("moe_router_enable_expert_bias", bool, False)
    none = kinds == ["none"]
    return {
        "moe_router_load_balancing_type": "none" if none else "seq_aux_loss",
        "moe_aux_loss_coeff": None if none else _coefficient(found, "moe_aux_loss_coeff"),
        "moe_router_score_function": score,
        # Of one expert mtk always takes the probability among all.
        "moe_router_pre_softmax": first and topk > 1,
        "moe_router_topk_scaling_factor": found.data.get("moe_router_topk_scaling_factor") or None,
        "moe_router_num_groups": found.data.get("moe_router_num_groups"),
        "moe_router_group_topk": found.data.get("moe_router_group_topk"),
        "moe_router_enable_expert_bias": biased,
        **(_bias_rate(found) if biased else {}),
        "moe_shared_expert_intermediate_size": (
            found.data.get("moe_shared_expert_intermediate_size") or None
        ),
        "moe_shared_expert_gate": found.get("moe_shared_expert_gate", bool, False),
        "num_experts": count,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": found.get(
            "moe_ffn_hidden_size", int, found.get("ffn_hidden_size", int)
        ),
        "moe_layer_freq": _layer_frequency(found),
        "moe_z_loss_coeff": _coefficient(found, "moe_z_loss_coeff"),
    }


def _layer_frequency(found: ForeignConfig) -> str:
    value = found.data.get("moe_layer_freq", 1)
    if isinstance(value, list) and value and all(one in (0, 1) for one in value):
        return as_text(tuple(one == 1 for one in value))
    if not isinstance(value, int | str) or isinstance(value, bool):
        found.complaints.append(f"moe_layer_freq = {value!r:.40}: must be a number or a list")
        return "1"
    return str(value)


def _bias_rate(found: ForeignConfig) -> dict[str, float]:
    return {"moe_router_bias_update_rate": found.get("moe_router_bias_update_rate", float, 1e-3)}


def _coefficient(found: ForeignConfig, name: str) -> float:
    value = found.data.get(name)
    if isinstance(value, list) and value:
        value = value[0]
    return float(value) if isinstance(value, int | float) else 0.0


def _suspect(args: Mapping[str, Any], name: str) -> bool:
    known = name in READ or name in HARMLESS or any(name == neutral for neutral, _, _ in NEUTRAL)
    if known or name.startswith(OTHER_TASKS) or args[name] in (None, False, 0, "", [], ()):
        return False
    return SOUNDS_LIKE_THE_MODEL.search(name) is not None


def _unknown(name: str, value: object) -> str:
    return (
        f"{name} = {value!r:.60}: mtk does not know this argument, and it sounds like a part of "
        f"the model. If it does not change what the model computes, give {name}: null in a file "
        f"with --megatron-args"
    )
