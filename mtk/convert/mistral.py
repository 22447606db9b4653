"""Mistral (Jiang et al. 2023) in the layout of transformers' ``MistralForCausalLM``: a Llama
whose tokens may look back through a window only."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert import gated_decoder
from mtk.convert.family import Family, ForeignConfig, bias_options, bias_reasons, reasons_against


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Mistral."""
    takes = gated_decoder.takes() | gated_decoder.takes_rope(config)
    takes["window_size"] = ((config.window_size,), "")
    found = reasons_against(config, "Mistral", takes)
    return found + bias_reasons(config, "Mistral", ((False, False, False),))


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "sliding_window": config.window_size,
        **gated_decoder.to_config(config),
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Mistral's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    found.require("layer_types", (None,), "one kind of attention for all layers is supported")
    # Absent means the 4096 of the first Mistral, null no window.
    window = None
    if found.data.get("sliding_window", 4096) is not None:
        window = found.get("sliding_window", int, 4096)
    return found.model(
        **gated_decoder.options(found, positions=4096 * 32, groups=8),
        **bias_options(qkv=False, output=False, mlp=False),
        window_size=window,
    )


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=gated_decoder.weights,
    linears=gated_decoder.LINEARS,
)
