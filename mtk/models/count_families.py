"""Parameters and FLOPs of BERT and T5 from their configuration alone (pre-LN, as Megatron's).

Both are planned and costed by this version, not trained.
"""

from __future__ import annotations

from dataclasses import replace

from mtk.config.model import ModelConfig
from mtk.models import count
from mtk.models.count import Flops, layer_matrices

# Vocabularies of the published models, used where none is given.
ASSUMED_VOCAB_SIZE = {"gpt": 50257, "bert": 30522, "t5": 32128}
# Megatron's T5 script decodes 128 tokens for 512 encoded ones.
DECODER_SHARE = 4


def parameters(config: ModelConfig, vocab_size: int | None = None) -> int:
    """All parameters of any family, padded vocabulary included."""
    vocab = config.padded_vocab_size if vocab_size is None else vocab_size
    if config.family == "gpt":
        return count.parameter_count(config, vocab)
    if config.family == "bert":
        return _bert(config, vocab)
    return _t5(config, vocab)


def active_parameters(config: ModelConfig) -> int:
    """The parameters that a token goes through: fewer than all in a model with experts."""
    if config.num_experts is None:
        return parameters(config)
    return count.active_parameter_count(config)


def flops_per_token(config: ModelConfig, vocab_size: int | None = None) -> Flops:
    """FLOPs of forward and backward for one token of the sample (T5: of the encoder)."""
    vocab = config.padded_vocab_size if vocab_size is None else vocab_size
    if config.family == "gpt":
        return count.flops_per_token(config, vocab)
    if config.family == "bert":
        # Every token sees every other: there is no masked half to leave out.
        full = count.flops_per_token(config, vocab).full + 6.0 * config.hidden_size**2
        return Flops(full=full, causal=full)
    return _t5_flops(config, vocab)


def layers_of(config: ModelConfig) -> int:
    """Transformer layers that are stacked: T5 has an encoder and a decoder of num_layers."""
    return config.num_layers * (2 if config.family == "t5" else 1)


def _bert(config: ModelConfig, vocab: int) -> int:
    hidden = config.hidden_size
    # Norms after layers need none at the end, but one after the embedding.
    body = count.parameter_count(config, vocab) + config.num_tokentypes * hidden
    head = hidden * hidden + hidden + _norm(config) + vocab
    binary = hidden * hidden + hidden + 2 * hidden + 2
    return body + head + (binary if config.bert_binary_head else 0)


def _t5(config: ModelConfig, vocab: int) -> int:
    encoder = count.parameter_count(config, vocab)
    embeddings = count.parameter_count(config, vocab) - _blocks(config) - _norm(config)
    decoder = encoder - embeddings + config.num_layers * _cross_attention(config)
    output_bias = vocab if config.add_bias_linear else 0
    return encoder + decoder + output_bias


def _blocks(config: ModelConfig) -> int:
    """The layers alone."""
    with_layers = count.parameter_count(config, 0)
    return with_layers - count.parameter_count(replace(config, num_layers=0), 0)


def _cross_attention(config: ModelConfig) -> int:
    """Query, key, value and output of the attention to the encoder, and its norm."""
    hidden, head = config.hidden_size, config.head_size
    heads, groups = config.num_attention_heads, config.query_groups
    biases = head * (heads + 2 * groups) if config.qkv_bias else 0
    biases += hidden if config.add_bias_linear else 0
    return 2 * hidden * head * (heads + groups) + biases + _norm(config)


def _norm(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.normalization == "LayerNorm" else 1)


def _t5_flops(config: ModelConfig, vocab: int) -> Flops:
    hidden, head = config.hidden_size, config.head_size
    heads, groups = config.num_attention_heads, config.query_groups
    encoded, decoded = config.seq_length, max(1, config.seq_length // DECODER_SHARE)
    query_output = 2 * hidden * head * heads
    key_value = 2 * hidden * head * groups
    matrices = encoded * layer_matrices(config) + decoded * layer_matrices(config)
    matrices += decoded * query_output + encoded * key_value
    fixed = 6.0 * (config.num_layers * matrices + decoded * vocab * hidden)
    width = 12.0 * config.num_layers * heads * head
    seen_by_all = width * (encoded * encoded + decoded * encoded)
    masked = width * decoded * decoded
    return Flops(
        full=(fixed + seen_by_all + masked) / encoded,
        causal=(fixed + seen_by_all + masked / 2) / encoded,
    )
