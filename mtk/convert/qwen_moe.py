"""Qwen1.5-MoE and Qwen2-MoE (biases in query, key and value, a gated shared expert) and
Qwen3-MoE (norms of query and key heads) in the layouts of transformers' ``Qwen2MoeForCausalLM``
and ``Qwen3MoeForCausalLM``. Some layers may be dense."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert import expert_layers, gated_decoder
from mtk.convert.family import Family, ForeignConfig, bias_options, bias_reasons, reasons_against
from mtk.convert.lazy import Tensors
from mtk.convert.mapping import Rename, Rule, WeightTable

MLP = "mlp"


def _takes(config: ModelConfig) -> gated_decoder.Takes:
    found = gated_decoder.takes() | gated_decoder.takes_rope(config) | expert_layers.takes(config)
    found["moe_router_pre_softmax"] = ((True, False), "")
    return found


def reasons_qwen2_moe(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Qwen2-MoE."""
    takes = _takes(config)
    width = config.moe_shared_expert_intermediate_size
    takes["moe_shared_expert_intermediate_size"] = ((width or -1,), "has a shared expert")
    takes["moe_shared_expert_gate"] = ((True,), "gates its shared expert")
    found = reasons_against(config, "Qwen2-MoE", takes)
    return found + bias_reasons(config, "Qwen2-MoE", ((True, False, False), (False, False, False)))


def reasons_qwen3_moe(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Qwen3-MoE."""
    takes = _takes(config)
    takes["qk_layernorm"] = ((True,), "has norms of query and key heads")
    takes["window_size"] = ((config.window_size,), "")
    found = reasons_against(config, "Qwen3-MoE", takes)
    return found + bias_reasons(config, "Qwen3-MoE", ((False, False, False), (True, True, False)))


def _to_config(config: ModelConfig) -> dict[str, Any]:
    dense = [i for i in range(config.num_layers) if not config.has_experts(i)]
    over_all = config.moe_router_pre_softmax or config.moe_router_topk == 1
    return {
        "hidden_act": "silu",
        "use_sliding_window": config.window_size is not None,
        "sliding_window": config.window_size,
        **gated_decoder.to_config(config),
        "moe_intermediate_size": config.moe_ffn_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "norm_topk_prob": not over_all,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "output_router_logits": False,
    }


def to_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "qkv_bias": config.qkv_bias,
        **_to_config(config),
        "shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
    }


def to_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``; the number of experts under its old name and that
    of transformers 5."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": config.qkv_bias,
        **_to_config(config),
        "num_local_experts": config.num_experts,
    }


def _options(found: ForeignConfig, experts: int, *, chosen: int, width: int) -> dict[str, Any]:
    """Native options of the experts; chosen, width: what transformers takes where the file does
    not say."""
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    k = found.get("num_experts_per_tok", int, chosen)
    normalised = found.get("norm_topk_prob", bool, False)
    if k == 1 and normalised:
        found.complaints.append(
            "norm_topk_prob with num_experts_per_tok = 1: its weight would be 1 whatever the "
            "router says"
        )
    return {
        "num_experts": experts,
        "moe_router_topk": k,
        "moe_router_pre_softmax": not normalised,
        "moe_ffn_hidden_size": found.get("moe_intermediate_size", int, width),
        "moe_layer_freq": expert_layers.layer_freq(_layers(found)),
    }


def _layers(found: ForeignConfig) -> list[bool]:
    """Which layers have experts."""
    count, step = found.get("num_hidden_layers", int), found.get("decoder_sparse_step", int, 1)
    dense = found.data.get("mlp_only_layers") or []
    if not isinstance(dense, list) or step < 1:
        found.complaints.append(
            f"mlp_only_layers = {dense!r} is not a list, or decoder_sparse_step = {step} not 1 "
            f"or more"
        )
        return [True] * count
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def from_qwen2_moe(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Qwen2-MoE's ``config.json``. Raises ConversionError."""
    found.require("use_sliding_window", (False, None), "a window in some layers only")
    biased = found.get("qkv_bias", bool, True)
    width = found.get("shared_expert_intermediate_size", int, 5632)
    return found.model(
        **gated_decoder.options(found, positions=32768, groups=16),
        **bias_options(qkv=biased, output=False, mlp=False),
        **_options(found, found.get("num_experts", int, 60), chosen=4, width=1408),
        moe_shared_expert_intermediate_size=width,
        moe_shared_expert_gate=True,
    )


def from_qwen3_moe(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Qwen3-MoE's ``config.json``. Raises ConversionError."""
    biased = found.get("attention_bias", bool, False)
    window = None
    if found.get("use_sliding_window", bool, False):
        stated = found.data.get("sliding_window", 4096) is not None
        window = found.get("sliding_window", int, 4096) if stated else None
    experts = found.get("num_experts", int, found.get("num_local_experts", int, 128))
    if found.get("num_local_experts", int, experts) != experts:
        found.complaints.append("num_experts and num_local_experts say different things")
    return found.model(
        **gated_decoder.options(found, positions=32768, groups=4),
        **bias_options(qkv=biased, output=biased, mlp=False),
        **_options(found, experts, chosen=8, width=768),
        window_size=window,
        qk_layernorm=True,
    )


def _mlp(config: ModelConfig, i: int) -> list[Rule]:
    if not config.has_experts(i):
        return gated_decoder.dense_mlp(config, i)
    rules = expert_layers.experts(config, i, MLP)
    if config.moe_shared_expert_intermediate_size is not None:
        n, h = f"layers.{i}.mlp.shared", f"model.layers.{i}.mlp"
        rules += expert_layers.shared_expert(i, "shared_expert")
        rules.append(Rename(f"{n}.token_gate.weight", f"{h}.shared_expert_gate.weight"))
    return rules


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight, one for the same part of all experts."""
    return gated_decoder.weights(config, _mlp)


def spelling(tensors: Tensors, config: ModelConfig) -> Tensors:
    return expert_layers.unstacked(tensors, config, MLP)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons_qwen2_moe,
    to_config=to_qwen2_moe,
    from_config=from_qwen2_moe,
    weights=weights,
    spelling=spelling,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons_qwen3_moe,
    to_config=to_qwen3_moe,
    from_config=from_qwen3_moe,
    weights=weights,
    spelling=spelling,
)
