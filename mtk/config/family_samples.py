"""A tiny model of every family: the parts are those of its recipe, the sizes a few thousandths.

A row says from which recipe it takes what the model is made of and how it is regularised, what it
changes of that, and how low its training loss must come on a text of a few kilobytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtk.config.model import ModelConfig
from mtk.config.recipes import RECIPES

# Of a recipe's training: what belongs to its kind of model rather than to its size.
REGULARISATION = ("weight_decay", "adam_beta2")
_SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "make_vocab_size_divisible_by": 16,
    # As much for this width as 0.02 for a thousand.
    "init_method_std": 0.08,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_ATTENTION: Mapping[str, Any] = {
    **_SIZES,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 128,
}
# Samples as long as they can be.
_ENCODER: Mapping[str, Any] = {**_ATTENTION, "short_seq_prob": 0.0}
_GROUPED: Mapping[str, Any] = {**_ATTENTION, "num_query_groups": 2}
_EXPERTS: Mapping[str, Any] = {
    **_GROUPED,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 64,
}
_MAMBA: Mapping[str, Any] = {
    **_SIZES,
    "mamba_head_dim": 16,
    "mamba_state_dim": 16,
    "mamba_chunk_size": 16,
}


@dataclass(frozen=True)
class FamilySample:
    """hf: the ``model_type`` that can express it, if one can. bound: training loss, in nats a
    predicted token, that ``steps`` steps must reach."""

    name: str
    recipe: str
    sizes: Mapping[str, Any]
    hf: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 300
    lr: float = 1e-2
    bound: float = 0.3

    @property
    def data(self) -> Literal["documents", "sentences"]:
        """What it trains on."""
        encoder = RECIPES[self.recipe].get("family") in ("bert", "t5")
        return "sentences" if encoder else "documents"

    @property
    def has_experts(self) -> bool:
        return bool(self.options.get("num_experts"))

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``mtk pretrain``: all of the model, some of the optimizer."""
        kept = {field.name for field in dataclasses.fields(ModelConfig)} | {*REGULARISATION}
        parts = {k: v for k, v in RECIPES[self.recipe].items() if k in kept}
        return {**parts, **self.sizes, **self.changes, "lr": self.lr}


# Masks are drawn anew in every epoch: far more steps, and still no text that repeats itself.
_BERT: Mapping[str, Any] = {"steps": 2000, "lr": 3e-3, "bound": 1.5}
_T5: Mapping[str, Any] = {"steps": 1500, "lr": 4e-3, "bound": 1.5}
_SAMPLES = (
    FamilySample("gpt2", "gpt-345m", _ATTENTION, "gpt2"),
    FamilySample("gpt3", "gpt3-175b", _ATTENTION, "gpt2"),
    # Scaled where a sequence of 64 tokens can see it.
    FamilySample("llama", "llama3.1-8b", _GROUPED, "llama", {"rope_original_max_positions": 16}),
    FamilySample("mistral", "mistral-7b", _GROUPED, "mistral", {"window_size": 16}),
    FamilySample("qwen2", "qwen2.5-7b", _GROUPED, "qwen2"),
    FamilySample("qwen3", "qwen3-8b", _GROUPED, "qwen3", {"kv_channels": 32}),
    FamilySample("gemma", "gemma-7b", _ATTENTION, "gemma", {"kv_channels": 32}),
    FamilySample("gpt_neox", "pythia-6.9b", _ATTENTION, "gpt_neox"),
    FamilySample("bloom", "bloom-7b1", _ATTENTION, "bloom", {"ffn_hidden_size": 256}),
    FamilySample(
        "relative",
        "gpt-345m",
        {**_ATTENTION, "max_position_embeddings": None},
        changes={
            "position_embedding_type": "relative",
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 48,
        },
    ),
    FamilySample("mixtral", "mixtral-8x7b", _EXPERTS, "mixtral"),
    FamilySample(
        "qwen2_moe",
        "qwen2.5-7b",
        _EXPERTS,
        "qwen2_moe",
        {
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": 64,
            "moe_shared_expert_gate": True,
        },
    ),
    FamilySample("qwen3_moe", "qwen3-30b-a3b", _EXPERTS, "qwen3_moe", {"kv_channels": 32}),
    FamilySample(
        "glm4_moe",
        "qwen2.5-7b",
        _EXPERTS,
        "glm4_moe",
        {
            "rotary_percent": 0.5,
            "moe_layer_freq": "[0]+[1]",
            "moe_router_topk": 4,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    FamilySample(
        "sinkhorn",
        "mixtral-8x7b",
        _EXPERTS,
        changes={"moe_router_load_balancing_type": "sinkhorn", "moe_router_pre_softmax": True},
    ),
    FamilySample(
        "mamba2", "mamba2-130m", _MAMBA, "mamba2", {"hybrid_layer_pattern": "MM"}, steps=150
    ),
    FamilySample(
        "hybrid",
        "hybrid-8b",
        {**_MAMBA, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 128},
        changes={"hybrid_layer_pattern": "M-*M-", "mamba_num_groups": 2},
        steps=150,
    ),
    FamilySample("bert_post", "bert-345m", _ENCODER, "bert", {"norm_placement": "post"}, **_BERT),
    FamilySample("bert_pre", "bert-345m", _ENCODER, "megatron-bert", **_BERT),
    FamilySample(
        "t5",
        "t5-220m",
        _ENCODER,
        "t5",
        {
            "decoder_seq_length": 32,
            "position_embedding_type": "relative",
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 48,
            "normalization": "RMSNorm",
            "activation": "geglu-tanh",
            "add_bias_linear": False,
            "softmax_scale": 1.0,
            "scale_tied_output": True,
        },
        **_T5,
    ),
    # Megatron-LM's own T5: learned positions, biases.
    FamilySample("t5_megatron", "t5-220m", _ENCODER, None, {"decoder_seq_length": 32}, **_T5),
)
FAMILY_SAMPLES: Mapping[str, FamilySample] = {sample.name: sample for sample in _SAMPLES}
