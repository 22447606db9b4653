"""Parameters and FLOPs of a model from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from mtk.config.model import ModelConfig


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
    return (3 if config.activation == "swiglu" else 2) * config.hidden_size * width


def expert_weights(config: ModelConfig) -> int:
    """Weights of all experts of all layers, routers not among them."""
    experts = config.moe_layers * (config.num_experts or 0)
    return experts * mlp_matrices(config, config.moe_ffn_size)


def active_expert_weights(config: ModelConfig) -> int:
    """Of these, the ones that a token goes through."""
    chosen = config.moe_layers * config.moe_router_topk
    return chosen * mlp_matrices(config, config.moe_ffn_size)


def shared_expert_weights(config: ModelConfig) -> int:
    """Weights of one MoE layer's shared expert, the gate of tokens among them."""
    width = config.moe_shared_expert_intermediate_size
    if width is None:
        return 0
    return mlp_matrices(config, width) + config.hidden_size * config.moe_shared_expert_gate


def _instead_of_dense(config: ModelConfig) -> int:
    """What MoE layers change besides their experts: routers and shared experts are there,
    dense MLPs are not."""
    own = config.hidden_size * (config.num_experts or 0) + shared_expert_weights(config)
    return config.moe_layers * (own - mlp_matrices(config, config.ffn_size))


def parameter_count(config: ModelConfig, vocab_size: int | None = None) -> int:
    """All parameters of a GPT, padded vocabulary included."""
    hidden, layers = config.hidden_size, config.num_layers
    vocab = config.padded_vocab_size if vocab_size is None else vocab_size
    per_norm = hidden * (2 if config.normalization == "LayerNorm" else 1)
    biases = 0
    heads, groups = config.num_attention_heads, config.query_groups
    if config.qkv_bias:
        biases += config.head_size * (heads + 2 * groups)
    if config.add_bias_linear:
        gates = 2 if config.activation == "swiglu" else 1
        biases += 2 * hidden + gates * config.ffn_size
    learned = config.positions * hidden if config.position_embedding_type == "learned" else 0
    output = vocab * hidden if config.untie_embeddings_and_output_weights else 0
    per_layer = layer_matrices(config) + biases + 2 * per_norm
    experts = _instead_of_dense(config) + expert_weights(config)
    return vocab * hidden + learned + layers * per_layer + experts + per_norm + output


def active_parameter_count(config: ModelConfig, vocab_size: int | None = None) -> int:
    """The parameters of a GPT that a token goes through; all of a dense one."""
    idle = expert_weights(config) - active_expert_weights(config)
    return parameter_count(config, vocab_size) - idle


def flops_per_token(config: ModelConfig, vocab_size: int | None = None) -> Flops:
    """6 x matrix weights (output matrix included, embedding look-up not) + attention; of
    experts those that a token goes to."""
    vocab = config.padded_vocab_size if vocab_size is None else vocab_size
    matrices = config.num_layers * layer_matrices(config) + vocab * config.hidden_size
    matrices += _instead_of_dense(config) + active_expert_weights(config)
    width = config.num_attention_heads * config.head_size
    attention = 12.0 * config.num_layers * width * config.seq_length
    return Flops(full=6.0 * matrices + attention, causal=6.0 * matrices + attention / 2)
