"""Parameters and FLOPs of a model from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mtk.config.model import ModelConfig
from mtk.models.count_pattern import (
    keys_seen,
    layer_flops,
    layer_parameters,
    mlp_weights,
    shared_expert_weights,
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token in forward + backward. full: attention counted over the whole
    square, as Megatron does; causal: only the half that is not masked."""

    full: float
    causal: float


def layer_matrices(config: ModelConfig) -> int:
    """Weights of one dense layer's matrices (no biases or norms)."""
    hidden, head = config.hidden_size, config.head_size
    attention = 2 * hidden * head * (config.num_attention_heads + config.query_groups)
    return attention + mlp_matrices(config, config.ffn_size)


def mlp_matrices(config: ModelConfig, width: int) -> int:
    """Weights of an MLP, or of one expert, of this width (no biases)."""
    return mlp_weights(config, width)


def expert_weights(config: ModelConfig) -> int:
    """Weights of all experts of all layers, routers not among them."""
    experts = config.moe_layers * (config.num_experts or 0)
    return experts * mlp_matrices(config, config.moe_ffn_size)


def active_expert_weights(config: ModelConfig) -> int:
    """Of these, the ones that a token goes through."""
    chosen = config.moe_layers * config.moe_router_topk
    return chosen * mlp_matrices(config, config.moe_ffn_size)


def instead_of_dense(config: ModelConfig) -> int:
    """What an MoE layer changes besides its experts: router and shared expert are there, the
    dense MLP is not."""
    own = config.hidden_size * (config.num_experts or 0) + shared_expert_weights(config)
    return own - mlp_matrices(config, config.ffn_size)


def parameter_count(config: ModelConfig, vocab_size: int | None = None) -> int:
    """All parameters of a GPT, padded vocabulary included."""
    hidden, layers = config.hidden_size, config.num_layers
    vocab = config.padded_vocab_size if vocab_size is None else vocab_size
    per_norm = hidden * (2 if config.normalization == "LayerNorm" else 1)
    per_layer = layer_matrices(config) + layer_biases(config) + 2 * per_norm
    if config.qk_layernorm:
        per_layer += 2 * config.head_size * per_norm // hidden
    output = vocab * hidden if config.untie_embeddings_and_output_weights else 0
    body = (
        layers * per_layer + config.moe_layers * instead_of_dense(config) + expert_weights(config)
    )
    if config.hybrid_layer_pattern is not None:
        body = sum(layer_parameters(config, kind) for kind in kinds(config))
    ends = _embedded_positions(config) + per_norm * (2 if config.embedding_layernorm else 1)
    return vocab * hidden + ends + body + output


def layer_biases(config: ModelConfig) -> int:
    """Biases of one layer's linear parts, its MLP dense."""
    hidden, biases = config.hidden_size, 0
    if config.qkv_bias:
        biases += config.head_size * (config.num_attention_heads + 2 * config.query_groups)
    if config.attention_output_bias:
        biases += hidden
    if config.mlp_bias:
        biases += hidden + (2 if config.gated else 1) * config.ffn_size
    return biases


def _embedded_positions(config: ModelConfig) -> int:
    """Weights that positions are learned in."""
    if config.position_embedding_type == "learned":
        return config.positions * config.hidden_size
    if config.position_embedding_type == "relative":
        return config.relative_attention_num_buckets * config.num_attention_heads
    return 0


def active_parameter_count(config: ModelConfig, vocab_size: int | None = None) -> int:
    """The parameters of a GPT that a token goes through; all of a dense one."""
    idle = expert_weights(config) - active_expert_weights(config)
    return parameter_count(config, vocab_size) - idle


def flops_per_token(config: ModelConfig, vocab_size: int | None = None) -> Flops:
    """6 x matrix weights (output matrix included, embedding look-up not) + attention; of
    experts those that a token goes to."""
    vocab = config.padded_vocab_size if vocab_size is None else vocab_size
    if config.hybrid_layer_pattern is not None:
        layers = [layer_flops(config, kind) for kind in kinds(config)]
        full, causal = (6.0 * vocab * config.hidden_size + sum(part) for part in _columns(layers))
        return Flops(full=full, causal=causal)
    matrices = config.num_layers * layer_matrices(config) + vocab * config.hidden_size
    matrices += config.moe_layers * instead_of_dense(config) + active_expert_weights(config)
    width = config.num_attention_heads * config.head_size
    each_key = 12.0 * config.num_layers * width
    seen = each_key * keys_seen(config)
    return Flops(full=6.0 * matrices + each_key * config.seq_length, causal=6.0 * matrices + seen)


def kinds(config: ModelConfig) -> str:
    """The letters of the first ``num_layers`` layers of a pattern."""
    return (config.hybrid_layer_pattern or "")[: config.num_layers]


def layer_costs(config: ModelConfig) -> list[float]:
    """FLOPs of each layer for one token, attention counted causally."""
    counts = range(config.num_layers + 1)
    sums = [flops_per_token(replace(config, num_layers=count)).causal for count in counts]
    return [more - less for less, more in pairwise(sums)]


def _columns(rows: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(row[0] for row in rows), tuple(row[1] for row in rows)
