"""What Llama, Mistral, Qwen and Gemma share in transformers: names of weights and of sizes.

Both sides rotate halves (channel c with c + R/2), so weights need a permutation only where the
native model rotates neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert.family import ForeignConfig, linear, training_length
from mtk.convert.mapping import (
    CutRows,
    PairedRows,
    Rename,
    Rule,
    TiedCopy,
    WeightTable,
    for_layers,
)
from mtk.convert.rope import KINDS, Spelling, read_rope, write_rope

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

ALL_CHANNELS = Spelling()
LayerRules = Callable[[ModelConfig, int], list[Rule]]
# For ``reasons_against``.
Takes = dict[str, tuple[tuple[Any, ...], str]]


def takes(activation: str = "swiglu") -> Takes:
    """What all of them express; each family adds its own."""
    return {
        "position_embedding_type": (("rope",), "rotates (rope)"),
        "rotary_percent": ((1.0,), "rotates whole heads"),
        "normalization": (("RMSNorm",), "has RMSNorm"),
        "activation": ((activation,), f"has {activation}"),
        "rotary_interleaved": ((True, False), ""),
    }


def takes_rope(config: ModelConfig) -> Takes:
    """Scaled rotation, whatever the numbers: each is written to ``config.json``."""
    numbers = [name for name in vars(config) if name.startswith(("rope_", "yarn_"))]
    found: Takes = {name: ((getattr(config, name),), "") for name in ("rotary_base", *numbers)}
    found["rope_scaling_type"] = ((None, *KINDS), "")
    return found


def to_config(config: ModelConfig, spelling: Spelling = ALL_CHANNELS) -> dict[str, Any]:
    """Sizes and rope as all of them state them; rope in both the old and the new spelling."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.head_size,
        "max_position_embeddings": config.positions,
        "rms_norm_eps": config.norm_epsilon,
        **write_rope(config, spelling),
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "use_cache": True,
        **training_length(config),
    }


def options(
    found: ForeignConfig,
    *,
    positions: int,
    groups: int | None = None,
    head: int | None = None,
    tied: bool = False,
    spelling: Spelling = ALL_CHANNELS,
) -> dict[str, Any]:
    """Native options of what all of them state; complaints go to ``found``.

    positions, groups, head, tied: what transformers takes where the file does not say
    (groups None: as heads; head None: hidden / heads).
    """
    heads, hidden = found.get("num_attention_heads", int), found.get("hidden_size", int)
    longest = found.get("max_position_embeddings", int, positions)
    # Null says as many as heads; only where nothing is said the family's own number counts.
    stated = "num_key_value_heads" in found.data or groups is None
    quotient = max(hidden // max(heads, 1), 1)
    own_head = quotient if head is None or "head_dim" in found.data else head
    return {
        "num_layers": found.get("num_hidden_layers", int),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": found.get("num_key_value_heads", int, heads if stated else groups),
        "ffn_hidden_size": found.get("intermediate_size", int),
        "kv_channels": found.get("head_dim", int, own_head),
        "seq_length": found.training_length(longest),
        "max_position_embeddings": longest,
        "position_embedding_type": "rope",
        **read_rope(found, longest, spelling),
        "normalization": "RMSNorm",
        "norm_epsilon": found.get("rms_norm_eps", float, 1e-6),
        "activation": "swiglu",
        "untie_embeddings_and_output_weights": not found.get("tie_word_embeddings", bool, tied),
        "hidden_dropout": 0.0,
        "attention_dropout": found.get("attention_dropout", float, 0.0),
        "init_method_std": found.get("initializer_range", float, 0.02),
        "vocab_size": found.get("vocab_size", int),
    }


def weights(config: ModelConfig, mlp: LayerRules | None = None) -> WeightTable:
    """One line a weight. mlp: rules of the MLP of layer number i, where it is not a dense one."""
    vocab, padded = config.vocab_size or 0, config.padded_vocab_size
    n, h = "layers.{i}", "model.layers.{i}"
    rules: list[Rule] = [
        CutRows("embedding.tokens.weight", "model.embed_tokens.weight", vocab, padded),
        *for_layers(
            config.num_layers,
            [
                *linear(f"{n}.attention_norm", f"{h}.input_layernorm", bias=False),
                *_attention(config, f"{n}.attention", f"{h}.self_attn"),
                *linear(f"{n}.mlp_norm", f"{h}.post_attention_layernorm", bias=False),
            ],
        ),
        *(rule for i in range(config.num_layers) for rule in (mlp or dense_mlp)(config, i)),
        *linear("final_norm", "model.norm", bias=False),
    ]
    copies: tuple[TiedCopy, ...] = (TiedCopy("lm_head.weight", "model.embed_tokens.weight"),)
    if config.untie_embeddings_and_output_weights:
        rules.append(CutRows("output.weight", "lm_head.weight", vocab, padded))
        copies = ()
    tables = (f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers))
    return WeightTable(tuple(rules), copies, frozenset(tables))


def dense_mlp(config: ModelConfig, i: int) -> list[Rule]:
    """The MLP of layer ``i``."""
    n, h, bias = f"layers.{i}.mlp", f"model.layers.{i}.mlp", config.mlp_bias
    return [
        *linear(f"{n}.gate", f"{h}.gate_proj", bias=bias),
        *linear(f"{n}.up", f"{h}.up_proj", bias=bias),
        *linear(f"{n}.down", f"{h}.down_proj", bias=bias),
    ]


def _attention(config: ModelConfig, n: str, h: str) -> list[Rename]:
    bias = config.qkv_bias
    rules = [
        *linear(f"{n}.query", f"{h}.q_proj", bias=bias),
        *linear(f"{n}.key", f"{h}.k_proj", bias=bias),
    ]
    if config.qk_layernorm:
        rules += linear(f"{n}.query_norm", f"{h}.q_norm", bias=False)
        rules += linear(f"{n}.key_norm", f"{h}.k_norm", bias=False)
    if config.rotary_interleaved:
        head = config.head_size
        rules = [PairedRows(rule.native, rule.foreign, head, head) for rule in rules]
    return [
        *rules,
        *linear(f"{n}.value", f"{h}.v_proj", bias=bias),
        *linear(f"{n}.output", f"{h}.o_proj", bias=config.attention_output_bias),
    ]
