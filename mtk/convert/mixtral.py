"""Mixtral (Jiang et al. 2024) in the layout of transformers' ``MixtralForCausalLM``: a Mistral
with experts in every layer. Files name each expert's ``w1`` (gate), ``w3`` (up), ``w2`` (down)."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert import expert_layers, gated_decoder
from mtk.convert.family import Family, ForeignConfig, bias_options, bias_reasons, reasons_against
from mtk.convert.lazy import Tensors
from mtk.convert.mapping import Rule, WeightTable

MLP, PARTS = "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
# What transformers takes where the file does not say.
DEFAULTS = {
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Mixtral."""
    takes = gated_decoder.takes() | gated_decoder.takes_rope(config) | expert_layers.takes(config)
    takes["window_size"] = ((config.window_size,), "")
    found = reasons_against(config, "Mixtral", takes)
    if config.num_experts is not None:
        if config.moe_layers != config.num_layers:
            freq = config.moe_layer_freq
            found.append(f"moe_layer_freq = {freq}: Mixtral has experts in every layer")
        found += expert_layers.normalised_reasons(config, "Mixtral")
    return found + bias_reasons(config, "Mixtral", ((False, False, False),))


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "sliding_window": config.window_size,
        **gated_decoder.to_config(config),
        "intermediate_size": config.moe_ffn_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Mixtral's ``config.json``. Raises ConversionError."""
    silent = {key: value for key, value in DEFAULTS.items() if found.data.get(key) is None}
    found = ForeignConfig({**found.data, **silent}, found.where)
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    found.require("router_jitter_noise", (0, None), "is not supported; 0 gives the same model")
    stated = found.data.get("sliding_window") is not None
    chosen = found.get("num_experts_per_tok", int)
    if chosen == 1:
        found.complaints.append(
            "num_experts_per_tok = 1: its weight would be 1 whatever the router says"
        )
    return found.model(
        **gated_decoder.options(found, positions=4096 * 32, groups=8),
        **bias_options(qkv=False, output=False, mlp=False),
        window_size=found.get("sliding_window", int) if stated else None,
        num_experts=found.get("num_local_experts", int),
        moe_router_topk=chosen,
    )


def _experts(config: ModelConfig, i: int) -> list[Rule]:
    return expert_layers.experts(config, i, MLP, PARTS)


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight, one for the same part of all experts."""
    return gated_decoder.weights(config, _experts)


def spelling(tensors: Tensors, config: ModelConfig) -> Tensors:
    return expert_layers.unstacked(tensors, config, MLP, PARTS)


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    spelling=spelling,
    aliases={"num_experts": "num_local_experts"},
)
