"""Llama (Touvron et al. 2023) in the layout of transformers' ``LlamaForCausalLM``.

Both sides rotate halves (channel c with c + R/2), so weights need no permutation.
"""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert.family import Family, ForeignConfig, linear, training_length
from mtk.convert.mapping import CutRows, Rule, TiedCopy, WeightTable, for_layers


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a Llama."""
    found = []
    if config.num_experts is not None:
        found.append(f"num_experts = {config.num_experts}: Llama is dense")
    if config.family != "gpt":
        found.append(f"family = {config.family}: Llama is a decoder")
    if config.position_embedding_type != "rope":
        kind = config.position_embedding_type
        found.append(f"position_embedding_type = {kind}: Llama rotates (rope)")
    elif config.rotary_percent != 1.0:
        found.append(f"rotary_percent = {config.rotary_percent}: Llama rotates whole heads")
    if config.normalization != "RMSNorm":
        found.append(f"normalization = {config.normalization}: Llama has RMSNorm")
    if config.activation != "swiglu":
        found.append(f"activation = {config.activation}: Llama has swiglu")
    if config.add_qkv_bias and not config.add_bias_linear:
        found.append(
            "add_qkv_bias = True without add_bias_linear: Llama's attention_bias also puts "
            "a bias on the output projection"
        )
    if config.hidden_size % config.num_attention_heads:
        found.append(
            f"hidden_size = {config.hidden_size}: transformers refuses a Llama whose hidden "
            f"size does not divide by its {config.num_attention_heads} heads"
        )
    return found


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``; rope in both the old and the new spelling."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "attention_bias": config.add_bias_linear,
        "mlp_bias": config.add_bias_linear,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "use_cache": True,
        **training_length(config),
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a Llama's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    rope = _rope(found)
    attention_bias = found.get("attention_bias", bool, False)
    if attention_bias != found.get("mlp_bias", bool, False):
        found.complaints.append(
            f"attention_bias = {attention_bias} and mlp_bias = {not attention_bias}: mtk has "
            f"biases in all linear layers or in none"
        )
    heads = found.get("num_attention_heads", int)
    hidden = found.get("hidden_size", int)
    positions = found.get("max_position_embeddings", int, 2048)
    return found.model(
        num_layers=found.get("num_hidden_layers", int),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=found.get("num_key_value_heads", int, heads),
        ffn_hidden_size=found.get("intermediate_size", int),
        kv_channels=found.get("head_dim", int, max(hidden // max(heads, 1), 1)),
        seq_length=found.training_length(positions),
        max_position_embeddings=positions,
        position_embedding_type="rope",
        rotary_base=rope,
        normalization="RMSNorm",
        norm_epsilon=found.get("rms_norm_eps", float, 1e-6),
        activation="swiglu",
        add_bias_linear=attention_bias,
        untie_embeddings_and_output_weights=not found.get("tie_word_embeddings", bool, False),
        hidden_dropout=0.0,
        attention_dropout=found.get("attention_dropout", float, 0.0),
        init_method_std=found.get("initializer_range", float, 0.02),
        vocab_size=found.get("vocab_size", int),
    )


def _rope(found: ForeignConfig) -> float:
    """The base; complains about any scaling, which would be wrong to leave out."""
    theta = found.get("rope_theta", float, 10000.0)
    for key in ("rope_parameters", "rope_scaling"):
        value = found.data.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            found.complaints.append(f"{key} = {value!r} is not an object")
            continue
        kind = value.get("rope_type", value.get("type", "default"))
        share = value.get("partial_rotary_factor", 1.0)
        if kind != "default" or share != 1.0:
            found.complaints.append(f"{key} = {value}: scaled rope is not supported")
        nested = ForeignConfig(value, found.where)
        theta = nested.get("rope_theta", float, theta)
        found.complaints += [f"{key}: {complaint}" for complaint in nested.complaints]
    return theta


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight."""
    vocab, padded, bias = config.vocab_size or 0, config.padded_vocab_size, config.add_bias_linear
    n, h = "layers.{i}", "model.layers.{i}"
    rules: list[Rule] = [
        CutRows("embedding.tokens.weight", "model.embed_tokens.weight", vocab, padded),
        *for_layers(
            config.num_layers,
            [
                *linear(f"{n}.attention_norm", f"{h}.input_layernorm", bias=False),
                *linear(f"{n}.attention.query", f"{h}.self_attn.q_proj", bias=bias),
                *linear(f"{n}.attention.key", f"{h}.self_attn.k_proj", bias=bias),
                *linear(f"{n}.attention.value", f"{h}.self_attn.v_proj", bias=bias),
                *linear(f"{n}.attention.output", f"{h}.self_attn.o_proj", bias=bias),
                *linear(f"{n}.mlp_norm", f"{h}.post_attention_layernorm", bias=False),
                *linear(f"{n}.mlp.gate", f"{h}.mlp.gate_proj", bias=bias),
                *linear(f"{n}.mlp.up", f"{h}.mlp.up_proj", bias=bias),
                *linear(f"{n}.mlp.down", f"{h}.mlp.down_proj", bias=bias),
            ],
        ),
        *linear("final_norm", "model.norm", bias=False),
    ]
    copies: tuple[TiedCopy, ...] = (TiedCopy("lm_head.weight", "model.embed_tokens.weight"),)
    if config.untie_embeddings_and_output_weights:
        rules.append(CutRows("output.weight", "lm_head.weight", vocab, padded))
        copies = ()
    tables = (f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers))
    return WeightTable(tuple(rules), copies, frozenset(tables))


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
)
