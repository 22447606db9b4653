"""T5 (Raffel et al. 2020) in the layout of transformers' ``T5ForConditionalGeneration``.

The first layer of each stack stores the table of relative positions that all layers use.
"""

from __future__ import annotations

from typing import Any

import torch

from mtk.config.model import ModelConfig
from mtk.convert.family import (
    Family,
    ForeignConfig,
    first_architecture,
    linear,
    reasons_against,
)
from mtk.convert.lazy import Tensors
from mtk.convert.mapping import CutRows, Rename, Rule, TiedCopy, WeightTable
from mtk.convert.probe import SEQ2SEQ

# Native activation -> transformers' name of the MLP.
MLPS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu-tanh": "gelu_new",
    "swiglu": "gated-silu",
    "geglu-tanh": "gated-gelu",
}
LENGTH = 512  # tokens that published models were trained at; config.json does not say
STACKS = ("encoder", "decoder")
T5_CLASS = "T5ForConditionalGeneration"
# What the class was called when the largest ones were published, and its part without the
# output matrix, which tied models do not need.
OLD_CLASSES = ("T5WithLMHeadModel", "T5Model")


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a T5 as transformers has it."""
    if config.family != "t5":
        return [f"family = {config.family}: T5 has an encoder and a decoder"]
    found = reasons_against(
        config,
        "T5",
        {
            "family": (("t5",), ""),
            "position_embedding_type": (("relative",), "adds relative positions to its scores"),
            "relative_attention_num_buckets": ((config.relative_attention_num_buckets,), ""),
            "relative_attention_max_distance": ((config.relative_attention_max_distance,), ""),
            "normalization": (("RMSNorm",), "has RMSNorm"),
            "activation": (tuple(MLPS), f"has {', '.join(MLPS)}"),
            "softmax_scale": ((1.0,), "does not scale scores (1.0)"),
            "scale_tied_output": ((True, False), ""),
            "decoder_seq_length": ((config.decoder_seq_length,), ""),
            "decoder_start_token_id": ((config.decoder_start_token_id,), ""),
        },
    )
    if config.add_bias_linear:
        found.append("add_bias_linear = True: no linear layer of T5 has a bias")
    if config.query_groups != config.num_attention_heads:
        found.append(f"num_query_groups = {config.query_groups}: T5 has as many as query heads")
    return found


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    tied = not config.untie_embeddings_and_output_weights
    return {
        "model_type": "t5",
        "architectures": [T5_CLASS],
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_size,
        "d_ff": config.ffn_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_attention_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "dropout_rate": config.hidden_dropout,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_factor": 1.0,
        "feed_forward_proj": MLPS[config.activation],
        "is_encoder_decoder": True,
        "use_cache": True,
        # None: that of the tokenizer, which whoever writes the directory knows.
        "decoder_start_token_id": config.decoder_start_token_id,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": config.scale_tied_output,
        "n_positions": config.positions,
        "mtk": {
            "seq_length": config.seq_length,
            "decoder_seq_length": config.decoder_seq_length,
            "init_method_std": config.init_method_std,
            "attention_dropout": config.attention_dropout,
        },
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a T5's ``config.json``. Raises ConversionError."""
    names = {foreign: native for native, foreign in MLPS.items()}
    found.require("feed_forward_proj", tuple(names), f"supported are {', '.join(names)}")
    layers = found.get("num_layers", int)
    found.require("num_decoder_layers", (layers, None), "both stacks have equally many here")
    tied = found.get("tie_word_embeddings", bool, True)
    # transformers derives these two, yet takes what a file says of them.
    gate, _, kind = found.get("feed_forward_proj", str, "relu").rpartition("-")
    derived = {
        "is_gated_act": bool(gate),
        "dense_act_fn": "gelu_new" if gate and kind == "gelu" else kind,
    }
    for key, value in derived.items():
        found.require(key, (value, None), f"feed_forward_proj makes it {value!r}")
    if first_architecture(found.data) not in (None, T5_CLASS, *OLD_CLASSES):
        found.complaints.append(
            f"architecture {first_architecture(found.data)}: supported is {T5_CLASS}"
        )
    own = found.data.get("mtk")
    stated = own if isinstance(own, dict) else {}
    positions = found.get("n_positions", int, LENGTH)
    dropout = found.get("dropout_rate", float, 0.1)
    return found.model(
        family="t5",
        num_layers=layers,
        hidden_size=found.get("d_model", int),
        num_attention_heads=found.get("num_heads", int),
        kv_channels=found.get("d_kv", int),
        ffn_hidden_size=found.get("d_ff", int),
        seq_length=found.training_length(positions),
        max_position_embeddings=positions,
        decoder_seq_length=stated.get("decoder_seq_length", 128),
        decoder_start_token_id=found.get("decoder_start_token_id", int, 0),
        position_embedding_type="relative",
        relative_attention_num_buckets=found.get("relative_attention_num_buckets", int, 32),
        relative_attention_max_distance=found.get("relative_attention_max_distance", int, 128),
        normalization="RMSNorm",
        norm_epsilon=found.get("layer_norm_epsilon", float, 1e-6),
        activation=names.get(found.get("feed_forward_proj", str, "relu"), "relu"),
        add_bias_linear=False,
        softmax_scale=1.0,
        # Null scales nothing, absent goes by what is tied.
        scale_tied_output=found.get(
            "scale_decoder_outputs", bool, tied and "scale_decoder_outputs" not in found.data
        ),
        untie_embeddings_and_output_weights=not tied,
        hidden_dropout=dropout,
        attention_dropout=stated.get("attention_dropout", dropout),
        init_method_std=stated.get("init_method_std", 0.02),
        vocab_size=found.get("vocab_size", int),
    )


def amended(foreign: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """transformers 5 writes of every T5 that its matrices are tied; of 1.1, whose are not, it
    stores both."""
    names = ("lm_head.weight", "shared.weight")
    doubtful = foreign.get("scale_decoder_outputs") is False and all(n in tensors for n in names)
    if not doubtful or torch.equal(*(tensors[name] for name in names)):
        return foreign
    return foreign | {"tie_word_embeddings": False}


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight."""
    vocab, padded = config.vocab_size or 0, config.padded_vocab_size
    rules: list[Rule] = [
        CutRows("embedding.tokens.weight", "shared.weight", vocab, padded),
        *linear("encoder_norm", "encoder.final_layer_norm", bias=False),
        *linear("final_norm", "decoder.final_layer_norm", bias=False),
    ]
    for stack, name in enumerate(STACKS):
        table = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules.append(Rename(f"{name}_bias.weight", table))
        for i in range(config.num_layers):
            rules += _layer(config, f"layers.{stack * config.num_layers + i}", f"{name}.block.{i}")
    copies = [TiedCopy(f"{name}.embed_tokens.weight", "shared.weight") for name in STACKS]
    if config.untie_embeddings_and_output_weights:
        rules.append(CutRows("output.weight", "lm_head.weight", vocab, padded))
    else:
        copies.append(TiedCopy("lm_head.weight", "shared.weight"))
    # Stored by old versions, never used: this attention has no positions.
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return WeightTable(tuple(rules), tuple(copies), frozenset({unused}))


def _layer(config: ModelConfig, native: str, foreign: str) -> list[Rename]:
    crossing = foreign.startswith("decoder")
    last = 2 if crossing else 1
    rules = _attention(f"{native}.attention", f"{foreign}.layer.0.SelfAttention")
    rules += linear(f"{native}.attention_norm", f"{foreign}.layer.0.layer_norm", bias=False)
    if crossing:
        rules += _attention(f"{native}.cross_attention", f"{foreign}.layer.1.EncDecAttention")
        rules += linear(f"{native}.cross_norm", f"{foreign}.layer.1.layer_norm", bias=False)
    dense = f"{foreign}.layer.{last}.DenseReluDense"
    rules += linear(f"{native}.mlp_norm", f"{foreign}.layer.{last}.layer_norm", bias=False)
    if config.gated:
        rules += linear(f"{native}.mlp.gate", f"{dense}.wi_0", bias=False)
    rules += linear(f"{native}.mlp.up", f"{dense}.{'wi_1' if config.gated else 'wi'}", bias=False)
    return rules + linear(f"{native}.mlp.down", f"{dense}.wo", bias=False)


def _attention(native: str, foreign: str) -> list[Rename]:
    parts = {"query": "q", "key": "k", "value": "v", "output": "o"}
    return [Rename(f"{native}.{a}.weight", f"{foreign}.{b}.weight") for a, b in parts.items()]


T5 = Family(
    model_type="t5",
    architecture=T5_CLASS,
    blocks="encoder.block decoder.block",
    # No name lacks anything: the base class stores them alike.
    prefix="",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    probe=SEQ2SEQ,
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    amended=amended,
)
