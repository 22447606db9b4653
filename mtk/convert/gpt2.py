"""GPT-2 (Radford et al. 2019) in the layout of transformers' ``GPT2LMHeadModel``."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert.family import (
    Family,
    ForeignConfig,
    bias_reasons,
    linear,
    reasons_against,
    training_length,
)
from mtk.convert.mapping import (
    CutRows,
    Fuse,
    Rename,
    Rule,
    TiedCopy,
    Transpose,
    WeightTable,
    for_layers,
)

# Native activation -> transformers' name; the second name of GPT-2's own comes from TensorFlow.
ACTIVATIONS = {"gelu": "gelu", "gelu-tanh": "gelu_new", "relu": "relu", "squared-relu": "relu2"}
SPELLINGS = {"gelu_pytorch_tanh": "gelu-tanh", "gelu_fast": "gelu-tanh"}


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a GPT-2."""
    takes = {
        "position_embedding_type": (("learned",), "learns positions"),
        "normalization": (("LayerNorm",), "has LayerNorm"),
        "activation": (tuple(ACTIVATIONS), "has an MLP without a gate"),
    }
    found = reasons_against(config, "GPT-2", takes)
    found += bias_reasons(config, "GPT-2", ((True, True, True),))
    if config.query_groups != config.num_attention_heads:
        groups = config.query_groups
        found.append(f"num_query_groups = {groups}: GPT-2 has as many key/value as query heads")
    if config.head_size * config.num_attention_heads != config.hidden_size:
        found.append(f"kv_channels = {config.head_size}: GPT-2's heads fill the hidden size")
    return found


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_size,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "use_cache": True,
        **training_length(config),
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a GPT-2's ``config.json``. Raises ConversionError."""
    found.require("scale_attn_weights", (True,), "scores without 1/sqrt(d) are not supported")
    found.require("scale_attn_by_inverse_layer_idx", (False, None), "is not supported")
    found.require("add_cross_attention", (False, None), "is not supported")
    names = {foreign: native for native, foreign in ACTIVATIONS.items()} | SPELLINGS
    found.require("activation_function", tuple(names), f"supported are {', '.join(names)}")
    activation = names.get(found.get("activation_function", str, "gelu_new"), "gelu-tanh")
    hidden = found.get("n_embd", int, 768)
    positions = found.get("n_positions", int, 1024)
    return found.model(
        num_layers=found.get("n_layer", int, 12),
        hidden_size=hidden,
        num_attention_heads=found.get("n_head", int, 12),
        ffn_hidden_size=found.get("n_inner", int, 4 * hidden),
        seq_length=found.training_length(positions),
        max_position_embeddings=positions,
        position_embedding_type="learned",
        normalization="LayerNorm",
        norm_epsilon=found.get("layer_norm_epsilon", float, 1e-5),
        activation=activation,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=not found.get("tie_word_embeddings", bool, True),
        hidden_dropout=found.get("resid_pdrop", float, 0.1),
        attention_dropout=found.get("attn_pdrop", float, 0.1),
        init_method_std=found.get("initializer_range", float, 0.02),
        vocab_size=found.get("vocab_size", int, 50257),
    )


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight. Conv1D keeps matrices [in, out]."""
    vocab, padded = config.vocab_size or 0, config.padded_vocab_size
    a, h = "layers.{i}.attention", "transformer.h.{i}"
    qkv_weights = (f"{a}.query.weight", f"{a}.key.weight", f"{a}.value.weight")
    qkv_biases = (f"{a}.query.bias", f"{a}.key.bias", f"{a}.value.bias")
    thirds = (config.hidden_size,) * 3
    rules: list[Rule] = [
        CutRows("embedding.tokens.weight", "transformer.wte.weight", vocab, padded),
        Rename("embedding.positions.weight", "transformer.wpe.weight"),
        *linear("final_norm", "transformer.ln_f", bias=True),
        *for_layers(
            config.num_layers,
            [
                *linear("layers.{i}.attention_norm", f"{h}.ln_1", bias=True),
                *linear(f"{a}.output", f"{h}.attn.c_proj", bias=True, rule=Transpose),
                *linear("layers.{i}.mlp_norm", f"{h}.ln_2", bias=True),
                *linear("layers.{i}.mlp.up", f"{h}.mlp.c_fc", bias=True, rule=Transpose),
                *linear("layers.{i}.mlp.down", f"{h}.mlp.c_proj", bias=True, rule=Transpose),
            ],
        ),
        *for_layers(
            config.num_layers,
            [
                Fuse(qkv_weights, f"{h}.attn.c_attn.weight", thirds, transposed=True),
                Fuse(qkv_biases, f"{h}.attn.c_attn.bias", thirds),
            ],
        ),
    ]
    copies: tuple[TiedCopy, ...] = (TiedCopy("lm_head.weight", "transformer.wte.weight"),)
    if config.untie_embeddings_and_output_weights:
        rules.append(CutRows("output.weight", "lm_head.weight", vocab, padded))
        copies = ()
    masks = [f"transformer.h.{i}.attn" for i in range(config.num_layers)]
    ignored = {f"{m}.bias" for m in masks} | {f"{m}.masked_bias" for m in masks}
    return WeightTable(tuple(rules), copies, frozenset(ignored))


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    blocks="transformer.h",
    prefix="transformer.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
