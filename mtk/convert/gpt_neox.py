"""GPT-NeoX (Black et al. 2022) and Pythia in the layout of transformers' ``GPTNeoXForCausalLM``:
query, key and value of a head lie together, part of each head is rotated, attention and MLP may
be parallel."""

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
from mtk.convert.gated_decoder import takes_rope
from mtk.convert.gpt2 import ACTIVATIONS, SPELLINGS
from mtk.convert.mapping import CutRows, FuseHeads, Rule, TiedCopy, WeightTable, for_layers
from mtk.convert.rope import Spelling, read_rope, write_rope

SPELLING = Spelling("rotary_emb_base", "rotary_pct", 0.25, partial=True)


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a GPT-NeoX."""
    takes = takes_rope(config) | {
        "position_embedding_type": (("rope",), "rotates (rope)"),
        "rotary_percent": ((config.rotary_percent,), ""),
        "use_parallel_residual": ((True, False), ""),
        "activation": (tuple(ACTIVATIONS), "has an MLP without a gate"),
        "normalization": (("LayerNorm",), "has LayerNorm"),
    }
    found = reasons_against(config, "GPT-NeoX", takes)
    found += bias_reasons(config, "GPT-NeoX", ((True, True, True), (False, False, True)))
    if config.query_groups != config.num_attention_heads:
        groups = config.query_groups
        found.append(f"num_query_groups = {groups}: GPT-NeoX has as many as query heads")
    if config.head_size * config.num_attention_heads != config.hidden_size:
        found.append(f"kv_channels = {config.head_size}: GPT-NeoX's heads fill the hidden size")
    return found


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``; rope in both the old and the new spelling."""
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": ACTIVATIONS[config.activation],
        "max_position_embeddings": config.positions,
        "layer_norm_eps": config.norm_epsilon,
        **write_rope(config, SPELLING),
        "use_parallel_residual": config.use_parallel_residual,
        "attention_bias": config.qkv_bias,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "use_cache": True,
        **training_length(config),
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a GPT-NeoX's ``config.json``. Raises ConversionError."""
    names = {foreign: native for native, foreign in ACTIVATIONS.items()} | SPELLINGS
    found.require("hidden_act", tuple(names), f"supported are {', '.join(names)}")
    found.require("is_decoder", (None, True, False), "is not supported")
    attention = found.get("attention_bias", bool, True)
    longest = found.get("max_position_embeddings", int, 2048)
    return found.model(
        num_layers=found.get("num_hidden_layers", int, 44),
        hidden_size=found.get("hidden_size", int, 6144),
        num_attention_heads=found.get("num_attention_heads", int, 64),
        ffn_hidden_size=found.get("intermediate_size", int, 24576),
        seq_length=found.training_length(longest),
        max_position_embeddings=longest,
        position_embedding_type="rope",
        **read_rope(found, longest, SPELLING),
        use_parallel_residual=found.get("use_parallel_residual", bool, True),
        normalization="LayerNorm",
        norm_epsilon=found.get("layer_norm_eps", float, 1e-5),
        activation=names.get(found.get("hidden_act", str, "gelu"), "gelu"),
        **bias_options(qkv=attention, output=attention, mlp=True),
        untie_embeddings_and_output_weights=not found.get("tie_word_embeddings", bool, False),
        hidden_dropout=found.get("hidden_dropout", float, 0.0),
        attention_dropout=found.get("attention_dropout", float, 0.0),
        init_method_std=found.get("initializer_range", float, 0.02),
        vocab_size=found.get("vocab_size", int, 50432),
    )


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight."""
    vocab, padded = config.vocab_size or 0, config.padded_vocab_size
    n, h, bias = "layers.{i}", "gpt_neox.layers.{i}", config.qkv_bias
    rules: list[Rule] = [
        CutRows("embedding.tokens.weight", "gpt_neox.embed_in.weight", vocab, padded),
        *linear("final_norm", "gpt_neox.final_layer_norm", bias=True),
        *for_layers(
            config.num_layers,
            [
                *linear(f"{n}.attention_norm", f"{h}.input_layernorm", bias=True),
                *linear(f"{n}.attention.output", f"{h}.attention.dense", bias=bias),
                *linear(f"{n}.mlp_norm", f"{h}.post_attention_layernorm", bias=True),
                *linear(f"{n}.mlp.up", f"{h}.mlp.dense_h_to_4h", bias=True),
                *linear(f"{n}.mlp.down", f"{h}.mlp.dense_4h_to_h", bias=True),
            ],
        ),
        *for_layers(config.num_layers, fused_heads(config, f"{h}.attention", bias=bias)),
    ]
    copies: tuple[TiedCopy, ...] = (TiedCopy("embed_out.weight", "gpt_neox.embed_in.weight"),)
    if config.untie_embeddings_and_output_weights:
        rules.append(CutRows("output.weight", "embed_out.weight", vocab, padded))
        copies = ()
    each = [f"gpt_neox.layers.{i}.attention" for i in range(config.num_layers)]
    tables = ("bias", "masked_bias", "rotary_emb.inv_freq")
    ignored = frozenset(f"{attention}.{table}" for attention in each for table in tables)
    return WeightTable(tuple(rules), copies, ignored)


def fused_heads(config: ModelConfig, attention: str, *, bias: bool) -> list[FuseHeads]:
    """Rules of ``query_key_value`` in the foreign module ``attention``."""
    rules = []
    for kind in ("weight", "bias")[: 2 if bias else 1]:
        natives = tuple(f"layers.{{i}}.attention.{p}.{kind}" for p in ("query", "key", "value"))
        foreign = f"{attention}.query_key_value.{kind}"
        sizes = (config.hidden_size,) * 3
        rules.append(FuseHeads(natives, foreign, sizes, head_size=config.head_size))
    return rules


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    blocks="gpt_neox.layers",
    prefix="gpt_neox.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    linears=(
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    outside=("embed_out.",),
)
