"""Parameters and FLOPs of BERT and T5 from their configuration alone."""

from __future__ import annotations

from dataclasses import replace

from mtk.config.heads import TASKS
from mtk.config.model import ModelConfig
from mtk.config.recipes import VOCABULARIES
from mtk.models import count
from mtk.models.count import Flops, layer_matrices

# Vocabularies of the published models, used where none is given.
ASSUMED_VOCAB_SIZE = {"gpt": 50257, "bert": 30522, "t5": 32128}


def assumed_vocab_size(recipe: str | None, family: str) -> int:
    """That of the weights a recipe is named after, else of the family."""
    return VOCABULARIES.get(recipe or "", ASSUMED_VOCAB_SIZE[family])


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
    if config.task_head is not None:
        outputs = TASKS[config.task_head].outputs
        return body + hidden * hidden + hidden + outputs * (hidden + 1)
    head = hidden * hidden + hidden + _norm(config) + vocab
    binary = hidden * hidden + hidden + 2 * hidden + 2
    return body + head + (binary if config.bert_binary_head else 0)


def _t5(config: ModelConfig, vocab: int) -> int:
    encoder = count.parameter_count(config, vocab)
    decoder = _blocks(config) + _norm(config) + config.num_layers * cross_attention(config)
    if config.position_embedding_type == "relative":  # a table for each stack
        decoder += config.relative_attention_num_buckets * config.num_attention_heads
    return encoder + decoder + (vocab if config.add_bias_linear else 0)


def _blocks(config: ModelConfig) -> int:
    """The layers alone."""
    with_layers = count.parameter_count(config, 0)
    return with_layers - count.parameter_count(replace(config, num_layers=0), 0)


def cross_attention(config: ModelConfig) -> int:
    """Query, key, value and output of the attention to the encoder, and its norm."""
    hidden, head = config.hidden_size, config.head_size
    heads, groups = config.num_attention_heads, config.query_groups
    biases = head * (heads + 2 * groups) if config.qkv_bias else 0
    biases += hidden if config.add_bias_linear else 0
    return 2 * hidden * head * (heads + groups) + biases + _norm(config)


def _norm(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.normalization == "LayerNorm" else 1)


def layer_costs(config: ModelConfig) -> list[float]:
    """FLOPs of each stacked layer for one token of the sample, for sharing them out."""
    if config.family != "t5":
        return count.layer_costs(config)
    encoder, decoder = _t5_layers(config)
    return [encoder.causal] * config.num_layers + [decoder.causal] * config.num_layers


def output_cost(config: ModelConfig) -> float:
    """FLOPs of the output matrix for one token of the sample."""
    return flops_per_token(replace(config, num_layers=0)).causal


def _t5_flops(config: ModelConfig, vocab: int) -> Flops:
    encoder, decoder = _t5_layers(config)
    output = 6.0 * config.decoder_seq_length * vocab * config.hidden_size / config.seq_length
    return Flops(
        full=config.num_layers * (encoder.full + decoder.full) + output,
        causal=config.num_layers * (encoder.causal + decoder.causal) + output,
    )


def _t5_layers(config: ModelConfig) -> tuple[Flops, Flops]:
    """One layer of the encoder and one of the decoder, for one token of the encoder."""
    hidden, head = config.hidden_size, config.head_size
    heads, groups = config.num_attention_heads, config.query_groups
    encoded, decoded = config.seq_length, config.decoder_seq_length
    matrices, each_key = layer_matrices(config), 12.0 * heads * head
    encoder = 6.0 * matrices + each_key * encoded
    share = decoded / encoded
    cross = share * 2 * hidden * head * heads + 2 * hidden * head * groups
    fixed = 6.0 * (share * matrices + cross) + each_key * decoded
    masked = each_key * share * decoded
    return Flops(encoder, encoder), Flops(full=fixed + masked, causal=fixed + masked / 2)
