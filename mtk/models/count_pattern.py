"""Parameters and FLOPs of models whose layers follow a pattern, layer by layer.

FLOPs of a Mamba layer's scan are counted as Megatron does, by the recurrence: 7 for each number
of the state and token (decay, inflow, read-out); the chunked form does more of them, as matrix
products. Like norms and activations the short convolution is not counted.
"""

from __future__ import annotations

from mtk.config.mamba import ATTENTION, EXPERTS, MAMBA, mamba_sizes
from mtk.config.model import ModelConfig

SCAN_FLOPS = 7


def mlp_weights(config: ModelConfig, width: int) -> int:
    """Matrices of an MLP, or of one expert, of this width."""
    return (3 if config.gated else 2) * config.hidden_size * width


def shared_expert_weights(config: ModelConfig) -> int:
    """Weights of one MoE layer's shared expert, the gate of tokens among them."""
    width = config.moe_shared_expert_intermediate_size
    if width is None:
        return 0
    return mlp_weights(config, width) + config.hidden_size * config.moe_shared_expert_gate


def keys_seen(config: ModelConfig) -> float:
    """Keys that a token of a training sequence looks at, on average (half a key rounded off)."""
    length = config.seq_length
    window = length if config.window_size is None else min(config.window_size, length)
    return window - window**2 / (2 * length)


def matrices(config: ModelConfig, kind: str, *, active: bool = False) -> int:
    """Weights of the matrices of a layer; ``active``: of experts those that a token goes to."""
    hidden, head = config.hidden_size, config.head_size
    if kind == ATTENTION:
        return 2 * hidden * head * (config.num_attention_heads + config.query_groups)
    if kind == MAMBA:
        sizes = mamba_sizes(config)
        return hidden * (3 * sizes.width + 2 * sizes.shared + sizes.heads)
    if kind == EXPERTS:
        experts = config.moe_router_topk if active else config.num_experts or 0
        router = hidden * (config.num_experts or 0)
        others = router + shared_expert_weights(config)
        return others + experts * mlp_weights(config, config.moe_ffn_size)
    return mlp_weights(config, config.ffn_size)


def _vectors(config: ModelConfig, kind: str) -> int:
    """Everything of a layer that is no matrix: norms, biases, convolutions, scalars of heads."""
    hidden, bias = config.hidden_size, config.add_bias_linear
    centred = 2 if config.normalization == "LayerNorm" else 1
    norm = hidden * centred
    if kind == ATTENTION:
        norm += 2 * config.head_size * centred if config.qk_layernorm else 0
        keys_values = config.head_size * (config.num_attention_heads + 2 * config.query_groups)
        output = hidden if config.attention_output_bias else 0
        return norm + (keys_values if config.qkv_bias else 0) + output
    if kind == MAMBA:
        sizes = mamba_sizes(config)
        channels = sizes.width + 2 * sizes.shared
        convolution = channels * (sizes.conv + (1 if config.mamba_conv_bias else 0))
        projections = sizes.width + channels + sizes.heads + hidden
        return norm + convolution + sizes.width + 3 * sizes.heads + (projections if bias else 0)
    gates = 2 if config.gated else 1
    biased = config.mlp_bias and kind != EXPERTS
    return norm + (hidden + gates * config.ffn_size if biased else 0)


def layer_parameters(config: ModelConfig, kind: str) -> int:
    """All parameters of one layer."""
    return matrices(config, kind) + _vectors(config, kind)


def layer_flops(config: ModelConfig, kind: str) -> tuple[float, float]:
    """Of one token, forward and backward: (attention in full, causal)."""
    products = 6.0 * matrices(config, kind, active=True)
    if kind == ATTENTION:
        width = config.num_attention_heads * config.head_size
        full, seen = 12.0 * width * config.seq_length, 12.0 * width * keys_seen(config)
        return products + full, products + seen
    if kind == MAMBA:
        sizes = mamba_sizes(config)
        products += 3.0 * SCAN_FLOPS * sizes.width * sizes.state
    return products, products
