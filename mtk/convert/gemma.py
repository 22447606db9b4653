"""Gemma (Gemma Team 2024, the first one) in the layout of transformers' ``GemmaForCausalLM``:
norm weights around zero, scaled embeddings, a GEGLU."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert import gated_decoder
from mtk.convert.family import Family, ForeignConfig, bias_options, bias_reasons, reasons_against

# The first files said "gelu" and meant its approximation, as transformers takes them too.
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Gemma."""
    takes = gated_decoder.takes("geglu-tanh") | gated_decoder.takes_rope(config)
    takes["apply_layernorm_1p"] = ((True,), "has norm weights around zero")
    takes["scale_embeddings"] = ((True,), "scales embeddings")
    found = reasons_against(config, "Gemma", takes)
    return found + bias_reasons(config, "Gemma", ((False, False, False), (True, True, False)))


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.qkv_bias,
        **gated_decoder.to_config(config),
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Gemma's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ACTIVATIONS, "Gemma has the tanh approximation of gelu")
    found.require("hidden_activation", (None, *ACTIVATIONS), "Gemma has gelu_pytorch_tanh")
    found.require("use_bidirectional_attention", (None, False), "is not supported")
    attention = found.get("attention_bias", bool, False)
    shared = gated_decoder.options(found, positions=8192, groups=16, head=256, tied=True)
    return found.model(
        **(shared | {"activation": "geglu-tanh"}),
        **bias_options(qkv=attention, output=attention, mlp=False),
        apply_layernorm_1p=True,
        scale_embeddings=True,
    )


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=gated_decoder.weights,
    linears=gated_decoder.LINEARS,
)
