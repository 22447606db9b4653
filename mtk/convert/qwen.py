"""Qwen2, 2.5 and 3 (Yang et al. 2024, 2025) in the layouts of transformers'
``Qwen2ForCausalLM`` (biases in query, key and value) and ``Qwen3ForCausalLM`` (norms of query
and key heads)."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert import gated_decoder
from mtk.convert.family import Family, ForeignConfig, bias_options, bias_reasons, reasons_against

FULL, SLIDING = "full_attention", "sliding_attention"


def _takes(config: ModelConfig) -> gated_decoder.Takes:
    found = gated_decoder.takes() | gated_decoder.takes_rope(config)
    found["window_size"] = ((config.window_size,), "")
    return found


def reasons_qwen2(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Qwen2."""
    found = reasons_against(config, "Qwen2", _takes(config))
    return found + bias_reasons(config, "Qwen2", ((True, False, False),))


def reasons_qwen3(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Qwen3."""
    takes = _takes(config)
    takes["qk_layernorm"] = ((True,), "has norms of query and key heads")
    found = reasons_against(config, "Qwen3", takes)
    return found + bias_reasons(config, "Qwen3", ((False, False, False), (True, True, False)))


def _to_config(config: ModelConfig) -> dict[str, Any]:
    window = config.window_size
    kind = FULL if window is None else SLIDING
    return {
        "hidden_act": "silu",
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # The first layer with a window.
        "max_window_layers": config.num_layers if window is None else 0,
        "layer_types": [kind] * config.num_layers,
        **gated_decoder.to_config(config),
    }


def to_qwen2(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **_to_config(config),
    }


def to_qwen3(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": config.qkv_bias,
        **_to_config(config),
    }


def _window(found: ForeignConfig) -> int | None:
    """The window of all layers, or None; complains where layers differ."""
    layers = found.get("num_hidden_layers", int)
    window = None
    used = found.get("use_sliding_window", bool, False)
    if used and found.data.get("sliding_window", 4096) is not None:
        window = found.get("sliding_window", int, 4096)
    kinds = found.data.get("layer_types")
    if kinds is None:
        first = found.get("max_window_layers", int, 28) if window is not None else layers
        kinds = [SLIDING if i >= first else FULL for i in range(layers)]
    if not isinstance(kinds, list) or kinds not in ([FULL] * layers, [SLIDING] * layers):
        found.complaints.append(
            "layer_types, or max_window_layers with use_sliding_window: a window in some layers "
            "only is not supported"
        )
        return None
    if SLIDING in kinds and window is None:
        found.complaints.append(f"layer_types say {SLIDING}, but there is no sliding_window")
    return window if SLIDING in kinds else None


def from_qwen2(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Qwen2's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    return found.model(
        **gated_decoder.options(found, positions=32768, groups=32),
        **bias_options(qkv=True, output=False, mlp=False),
        window_size=_window(found),
    )


def from_qwen3(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Qwen3's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    attention = found.get("attention_bias", bool, False)
    return found.model(
        **gated_decoder.options(found, positions=32768, groups=32, head=128),
        **bias_options(qkv=attention, output=attention, mlp=False),
        window_size=_window(found),
        qk_layernorm=True,
    )


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons_qwen2,
    to_config=to_qwen2,
    from_config=from_qwen2,
    weights=gated_decoder.weights,
    linears=gated_decoder.LINEARS,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons_qwen3,
    to_config=to_qwen3,
    from_config=from_qwen3,
    weights=gated_decoder.weights,
    linears=gated_decoder.LINEARS,
)
