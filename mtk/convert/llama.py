"""Llama 1 to 3.x (Touvron et al. 2023, Dubey et al. 2024) in the layout of transformers'
``LlamaForCausalLM``, with any scaling of rope."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert import gated_decoder
from mtk.convert.family import Family, ForeignConfig, bias_options, bias_reasons, reasons_against

BIASES = (
    (False, False, False),
    (True, True, False),
    (False, False, True),
    (True, True, True),
)


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Llama."""
    takes = gated_decoder.takes() | gated_decoder.takes_rope(config)
    found = reasons_against(config, "Llama", takes) + bias_reasons(config, "Llama", BIASES)
    if config.hidden_size % config.num_attention_heads:
        found.append(
            f"hidden_size = {config.hidden_size}: transformers refuses a Llama whose hidden "
            f"size does not divide by its {config.num_attention_heads} heads"
        )
    return found


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **gated_decoder.to_config(config),
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Llama's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    attention = found.get("attention_bias", bool, False)
    biases = bias_options(qkv=attention, output=attention, mlp=found.get("mlp_bias", bool, False))
    return found.model(**gated_decoder.options(found, positions=2048), **biases)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=gated_decoder.weights,
    linears=gated_decoder.LINEARS,
)
