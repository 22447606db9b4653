"""A native configuration as Megatron's arguments, and what keeps it from being one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import gcd
from typing import Any

import torch

from mtk.config.layer_pattern import layer_pattern
from mtk.config.model import ModelConfig
from mtk.config.nearest import nearest_divisor
from mtk.config.positions import LLAMA3_ORIGINAL
from mtk.convert.megatron.argument_tables import NEUTRAL, words
from mtk.convert.megatron.arguments import MEGATRON_FACTOR, POSITIONS
from mtk.convert.megatron.bert import unwritable_bert
from mtk.errors import Problem

# Fields of a configuration that are written below, or only concern training. Any other that
# is set is refused, so that none can be added and forgotten here.
WRITTEN = words(
    """
    family num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size
    kv_channels seq_length max_position_embeddings position_embedding_type rotary_base
    rotary_percent normalization norm_epsilon activation add_bias_linear add_qkv_bias
    untie_embeddings_and_output_weights hidden_dropout attention_dropout num_experts
    moe_router_topk moe_ffn_hidden_size moe_layer_freq moe_aux_loss_coeff moe_z_loss_coeff
    init_method_std vocab_size make_vocab_size_divisible_by apply_layernorm_1p qk_layernorm
    window_size rotary_interleaved rope_scaling_type rope_scaling_factor
    rope_original_max_positions moe_router_score_function moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
    moe_router_load_balancing_type moe_router_enable_expert_bias moe_router_bias_update_rate
    moe_shared_expert_intermediate_size moe_shared_expert_gate bert_head_activation
    """
)


def write_arguments(config: ModelConfig, rows: int, tensor: int, pipeline: int) -> dict[str, Any]:
    """What Megatron's ``--use-checkpoint-args`` and its checks look for."""
    rope = config.position_embedding_type == "rope"
    spelling = {native: foreign for foreign, native in POSITIONS.items() if foreign != "absolute"}
    args = {name: allowed[0] for name, allowed, why in NEUTRAL if why}
    args |= {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.query_groups != config.num_attention_heads,
        "num_query_groups": config.query_groups,
        "kv_channels": config.head_size,
        "seq_length": config.seq_length,
        "encoder_seq_length": config.seq_length,
        "max_position_embeddings": config.positions,
        "position_embedding_type": spelling[config.position_embedding_type],
        "add_position_embedding": True,
        "use_rotary_position_embeddings": rope,
        "rotary_base": int(config.rotary_base),
        "rotary_percent": config.rotary_percent,
        "rotary_interleaved": config.rotary_interleaved,
        "use_rope_scaling": config.rope_scaling_type == "llama3",
        "rope_scaling_factor": config.rope_scaling_factor,
        "window_size": None if config.window_size is None else (config.window_size - 1, 0),
        "apply_layernorm_1p": config.apply_layernorm_1p,
        "qk_layernorm": config.qk_layernorm,
        "normalization": config.normalization,
        "norm_epsilon": config.norm_epsilon,
        "add_bias_linear": config.add_bias_linear,
        "add_qkv_bias": config.add_qkv_bias,
        "swiglu": config.activation == "swiglu",
        "squared_relu": config.activation == "squared-relu",
        "openai_gelu": False,
        "onnx_safe": None,
        "bias_gelu_fusion": config.activation == "gelu-tanh",
        "untie_embeddings_and_output_weights": config.untie_embeddings_and_output_weights,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "init_method_std": config.init_method_std,
        "apply_query_key_layer_scaling": False,
        "num_experts": config.num_experts,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
        "tokenizer_type": None,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": tensor,
        "world_size": tensor * pipeline,
        "use_legacy_models": False,
        "ckpt_format": "torch",
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    if config.num_experts is not None:
        args |= {
            "moe_router_topk": config.moe_router_topk,
            "moe_router_score_function": config.moe_router_score_function,
            "moe_router_pre_softmax": _over_all(config),
            "moe_router_topk_scaling_factor": config.moe_router_topk_scaling_factor,
            "moe_router_num_groups": config.moe_router_num_groups,
            "moe_router_group_topk": config.moe_router_group_topk,
            "moe_router_load_balancing_type": config.moe_router_load_balancing_type,
            "moe_router_enable_expert_bias": config.moe_router_enable_expert_bias,
            "moe_router_bias_update_rate": config.moe_router_bias_update_rate,
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
            "moe_shared_expert_gate": config.moe_shared_expert_gate,
            "moe_ffn_hidden_size": config.moe_ffn_size,
            "moe_layer_freq": _layer_frequency(config),
            "moe_aux_loss_coeff": config.aux_loss_coeff,
            "moe_z_loss_coeff": config.moe_z_loss_coeff or None,
            "moe_grouped_gemm": False,
        }
    return args


def _over_all(config: ModelConfig) -> bool:
    if config.moe_router_score_function != "softmax":
        return False
    return config.moe_router_pre_softmax or config.moe_router_topk == 1


def _layer_frequency(config: ModelConfig) -> int | list[int]:
    pattern = layer_pattern(config.moe_layer_freq)
    return pattern if isinstance(pattern, int) else [int(one) for one in pattern]


def dtype_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """Of the weights' precision."""
    return {
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }


def unwritable(config: ModelConfig) -> Iterator[str]:
    """Everything that keeps a native model from being one of Megatron's."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in WRITTEN and value != field.default:
            yield f"{field.name} = {value!r}: is not written to Megatron's format"
    if config.family == "bert":
        yield from unwritable_bert(config)
    elif config.family != "gpt":
        yield f"family = {config.family}: only GPT and BERT are written"
    if config.activation not in ("gelu", "gelu-tanh", "squared-relu", "swiglu"):
        yield f"activation = {config.activation}: Megatron has gelu, squared-relu and swiglu"
    experts = config.num_experts is not None
    if config.activation == "gelu-tanh" and (experts or not config.add_bias_linear):
        yield (
            "activation = gelu-tanh: Megatron approximates gelu only where it fuses it with "
            "a bias (add_bias_linear)"
        )
    if config.position_embedding_type not in POSITIONS.values():
        yield f"position_embedding_type = {config.position_embedding_type}: Megatron has none such"
    yield from _unwritable_rope(config)
    if config.moe_router_load_balancing_type == "sinkhorn":
        yield (
            "moe_router_load_balancing_type = sinkhorn: Megatron weighs experts in another way then"
        )


def _unwritable_rope(config: ModelConfig) -> Iterator[str]:
    if config.rope_scaling_type not in (None, "llama3"):
        yield f"rope_scaling_type = {config.rope_scaling_type}: Megatron's GPT has llama3 only"
    elif config.rope_scaling_type and config.rope_scaling_factor != MEGATRON_FACTOR:
        yield (
            f"rope_scaling_factor = {config.rope_scaling_factor}: until August 2026 Megatron "
            f"computed with {MEGATRON_FACTOR} whatever it was told"
        )
    if config.rope_original_positions != LLAMA3_ORIGINAL:
        yield (
            f"rope_original_max_positions = {config.rope_original_positions}: Megatron scales "
            f"from {LLAMA3_ORIGINAL} only"
        )
    if config.rotary_base != int(config.rotary_base):
        yield f"rotary_base = {config.rotary_base}: Megatron's is a whole number"


def layout_problems(config: ModelConfig, tensor: int, pipeline: int) -> Iterator[Problem]:
    """Target sizes that do not divide the model, each with the nearest legal value."""
    widths = {"num_query_groups": config.query_groups}
    if config.moe_layers < config.num_layers:
        widths["ffn_hidden_size"] = config.ffn_size
    if config.moe_layers:
        widths["moe_ffn_hidden_size"] = config.moe_ffn_size
    if config.moe_shared_expert_intermediate_size:
        name = "moe_shared_expert_intermediate_size"
        widths[name] = config.moe_shared_expert_intermediate_size
    if any(width % tensor for width in widths.values()):
        listed = ", ".join(f"{name} = {width}" for name, width in widths.items())
        fix = f"Nearest: {nearest_divisor(tensor, gcd(*widths.values()))}."
        yield Problem("target_tensor_parallel_size", tensor, f"must divide {listed}", fix)
    if config.num_layers % pipeline:
        rule = f"must divide num_layers = {config.num_layers}"
        fix = f"Nearest: {nearest_divisor(pipeline, config.num_layers)}."
        yield Problem("target_pipeline_parallel_size", pipeline, rule, fix)
