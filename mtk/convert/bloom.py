"""BLOOM (Le Scao et al. 2022) in the layout of transformers' ``BloomForCausalLM``: ALiBi and a
norm after the embedding."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert.family import (
    Family,
    ForeignConfig,
    bias_options,
    bias_reasons,
    linear,
    reasons_against,
    training_length,
)
from mtk.convert.gpt_neox import fused_heads
from mtk.convert.mapping import CutRows, Rule, TiedCopy, WeightTable, for_layers

# Tokens of a sample in its training; ``config.json`` need not tell, as ALiBi has no last one.
TRAINED = 2048


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a BLOOM."""
    takes = {
        "position_embedding_type": (("alibi",), "biases scores (alibi)"),
        "embedding_layernorm": ((True,), "has a norm after the embedding"),
        "activation": (("gelu-tanh",), "has gelu-tanh"),
        "normalization": (("LayerNorm",), "has LayerNorm"),
    }
    found = reasons_against(config, "BLOOM", takes)
    found += bias_reasons(config, "BLOOM", ((True, True, True),))
    if config.query_groups != config.num_attention_heads:
        found.append(f"num_query_groups = {config.query_groups}: BLOOM has as many as query heads")
    if config.head_size * config.num_attention_heads != config.hidden_size:
        found.append(f"kv_channels = {config.head_size}: BLOOM's heads fill the hidden size")
    if config.ffn_size != 4 * config.hidden_size:
        found.append(f"ffn_hidden_size = {config.ffn_size}: BLOOM's is 4 x hidden_size")
    return found


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "seq_length": config.positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "use_cache": True,
        **training_length(config),
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a BLOOM's ``config.json``. Raises ConversionError."""
    after = "apply_residual_connection_post_layernorm"
    found.require(after, (False, None), "is not supported")
    hidden = found.get("hidden_size", int, 64)
    longest = found.get("seq_length", int, TRAINED)
    return found.model(
        num_layers=found.get("n_layer", int, 2),
        hidden_size=hidden,
        num_attention_heads=found.get("n_head", int, 8),
        ffn_hidden_size=4 * hidden,
        seq_length=found.training_length(longest),
        max_position_embeddings=longest,
        position_embedding_type="alibi",
        embedding_layernorm=True,
        normalization="LayerNorm",
        norm_epsilon=found.get("layer_norm_epsilon", float, 1e-5),
        activation="gelu-tanh",
        **bias_options(qkv=True, output=True, mlp=True),
        untie_embeddings_and_output_weights=not found.get("tie_word_embeddings", bool, True),
        hidden_dropout=found.get("hidden_dropout", float, 0.0),
        attention_dropout=found.get("attention_dropout", float, 0.0),
        init_method_std=found.get("initializer_range", float, 0.02),
        vocab_size=found.get("vocab_size", int, 250880),
    )


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight."""
    vocab, padded = config.vocab_size or 0, config.padded_vocab_size
    n, h, embedding = "layers.{i}", "transformer.h.{i}", "transformer.word_embeddings"
    rules: list[Rule] = [
        CutRows("embedding.tokens.weight", f"{embedding}.weight", vocab, padded),
        *linear("embedding.norm", f"{embedding}_layernorm", bias=True),
        *linear("final_norm", "transformer.ln_f", bias=True),
        *for_layers(
            config.num_layers,
            [
                *linear(f"{n}.attention_norm", f"{h}.input_layernorm", bias=True),
                *linear(f"{n}.attention.output", f"{h}.self_attention.dense", bias=True),
                *linear(f"{n}.mlp_norm", f"{h}.post_attention_layernorm", bias=True),
                *linear(f"{n}.mlp.up", f"{h}.mlp.dense_h_to_4h", bias=True),
                *linear(f"{n}.mlp.down", f"{h}.mlp.dense_4h_to_h", bias=True),
            ],
        ),
        *for_layers(config.num_layers, fused_heads(config, f"{h}.self_attention", bias=True)),
    ]
    copies: tuple[TiedCopy, ...] = (TiedCopy("lm_head.weight", f"{embedding}.weight"),)
    if config.untie_embeddings_and_output_weights:
        rules.append(CutRows("output.weight", "lm_head.weight", vocab, padded))
        copies = ()
    return WeightTable(tuple(rules), copies)


BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    blocks="transformer.h",
    prefix="transformer.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    # The published files say n_embed and num_attention_heads.
    aliases={
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
    linears=(
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
)
