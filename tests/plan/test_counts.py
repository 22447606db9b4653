"""Parameter and FLOP counts against published numbers and against built models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.config.recipes import RECIPES
from mtk.convert.families import family_for
from mtk.convert.mixtral import reasons, to_config
from mtk.models.build import build_on_meta
from mtk.models.count_families import active_parameters, flops_per_token, parameters

LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
GPT2_MEDIUM = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 1024}


def model(**values: Any) -> ModelConfig:
    return make(ModelConfig, **{"make_vocab_size_divisible_by": 1, **values})


PUBLISHED = [
    # Hugging Face's own counts of the released weights.
    ("gpt2-medium", {**GPT2_MEDIUM, "vocab_size": 50257}, 354_823_168),
    (
        "llama2-7b",
        {
            **LLAMA,
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "ffn_hidden_size": 11008,
            "seq_length": 4096,
            "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    (
        "bert-large",  # post-LN: its embedding norm stands for the final norm here
        {
            "family": "bert",
            "num_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "seq_length": 512,
            "vocab_size": 30522,
        },
        336_226_108,
    ),
    (
        "t5-base",  # without its 2 x 32 x 12 relative position weights
        {
            "family": "t5",
            "num_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "ffn_hidden_size": 3072,
            "seq_length": 512,
            "vocab_size": 32128,
            "position_embedding_type": "none",
            "normalization": "RMSNorm",
            "activation": "relu",
            "add_bias_linear": False,
        },
        222_903_552 - 768,
    ),
]


@pytest.mark.parametrize(("name", "values", "expected"), PUBLISHED, ids=lambda v: str(v)[:12])
def test_published_counts(name: str, values: dict[str, Any], expected: int) -> None:
    assert parameters(model(**values)) == expected, name


# Elements of the released weights; vocabularies are multiples of 128.
RELEASED = {
    "llama2-7b": (32000, 6_738_415_616),
    "llama3-8b": (128256, 8_030_261_248),
    "llama3.1-8b": (128256, 8_030_261_248),
    "llama3.2-1b": (128256, 1_235_814_400),
    "mistral-7b": (32000, 7_241_732_096),
    "qwen2.5-7b": (152064, 7_615_616_512),
    "qwen3-8b": (151936, 8_190_735_360),
    "gemma-7b": (256000, 8_537_680_896),
    "pythia-6.9b": (50432, 6_857_302_016),
    "bloom-7b1": (250880, 7_069_016_064),
}


@pytest.mark.parametrize("name", RELEASED)
def test_recipes_have_the_published_sizes(name: str) -> None:
    vocab, expected = RELEASED[name]
    fields = ModelConfig.__dataclass_fields__
    sizes = {key: value for key, value in RECIPES[name].items() if key in fields}
    assert parameters(make(ModelConfig, **sizes, vocab_size=vocab)) == expected


MIXTRAL = {
    **LLAMA,
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "num_experts": 8,
    "seq_length": 4096,
    "vocab_size": 32000,
}


def test_mixtral_and_what_a_token_uses_of_it() -> None:
    config = model(**MIXTRAL)
    assert parameters(config) == 46_702_792_704  # Hugging Face's count of Mixtral-8x7B
    assert round(active_parameters(config) / 1e9, 1) == 12.9  # Jiang et al. 2024
    # A dense model of the active width, but for the router, does the same work.
    twice = {**MIXTRAL, "ffn_hidden_size": 2 * 14336, "num_experts": None}
    routers = 32 * 8 * 4096
    dense = model(**twice)
    assert active_parameters(config) == parameters(dense) + routers
    assert flops_per_token(config).full == flops_per_token(dense).full + 6 * routers


@pytest.mark.parametrize(
    ("values", "billions"),
    [
        # Megatron-LM's tables: rounded as printed there (51,200 and 131,072 ids).
        (
            {
                "num_layers": 96,
                "hidden_size": 12288,
                "num_attention_heads": 96,
                "seq_length": 2048,
                "vocab_size": 51200,
            },
            174.6,
        ),
        (
            {
                "num_layers": 24,
                "hidden_size": 2048,
                "num_attention_heads": 16,
                "seq_length": 4096,
                "vocab_size": 131072,
                "untie_embeddings_and_output_weights": True,
                "position_embedding_type": "rope",
            },
            1.7,
        ),
    ],
)
def test_rounded_counts(values: dict[str, Any], billions: float) -> None:
    assert round(parameters(model(**values)) / 1e9, 1) == billions


def test_flops_of_llama3_8b_at_8192() -> None:
    config = model(
        **LLAMA,
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        seq_length=8192,
        vocab_size=128256,
    )
    flops = flops_per_token(config)
    assert flops.causal / 1e9 == pytest.approx(51.47, abs=0.02)
    assert flops.full / 1e9 == pytest.approx(57.91, abs=0.02)


def test_bert_has_no_masked_half_and_t5_counts_both_stacks() -> None:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 32,
        "vocab_size": 100,
    }
    bert = flops_per_token(model(family="bert", **sizes))
    gpt = flops_per_token(model(**sizes))
    t5 = flops_per_token(model(family="t5", decoder_seq_length=8, **sizes))
    assert bert.full == bert.causal == gpt.full + 6 * 64**2
    # Encoder: every token; decoder with cross attention: a quarter of the tokens.
    layer, width, query_output, key_value = 12 * 64**2, 12 * 2 * 64, 2 * 64**2, 2 * 64**2
    matrices = 6 * (2 * (layer + layer / 4 + query_output / 4 + key_value) + 100 * 64 / 4)
    assert t5.full == matrices + width * (32 + 8 + 2)
    assert t5.causal == matrices + width * (32 + 8 + 1)


BUILT: list[dict[str, Any]] = [
    {},
    {"moe_layer_freq": "[0]*2+[1]*2", "ffn_hidden_size": 40},
    {"moe_shared_expert_intermediate_size": 24},
    {
        "moe_shared_expert_intermediate_size": 24,
        "moe_shared_expert_gate": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_layer_freq": 3,
        "activation": "gelu",
        "moe_router_topk": 3,
    },
    {
        "moe_shared_expert_intermediate_size": 24,
        "hybrid_layer_pattern": "M*-E",
        "mamba_num_groups": 2,
    },
]


@pytest.mark.parametrize("changes", BUILT, ids=str)
def test_models_with_experts_as_built(changes: dict[str, Any]) -> None:
    """Counted on the module; of a token's work on the matrices that it passes."""
    config = model(
        **{
            **LLAMA,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "moe_ffn_hidden_size": 16,
            "num_experts": 8,
            "seq_length": 16,
            "vocab_size": 50,
            "mamba_head_dim": 16 if "hybrid_layer_pattern" in changes else 64,
            **changes,
        }
    )
    built = {name: p.numel() for name, p in build_on_meta(config).named_parameters()}
    assert parameters(config) == sum(built.values())
    k = config.moe_router_topk
    idle = sum(n // 8 * (8 - k) for name, n in built.items() if ".experts." in name)
    assert active_parameters(config) == sum(built.values()) - idle
    shared = [n for name, n in built.items() if ".shared." in name]
    without = replace(
        config, moe_shared_expert_intermediate_size=None, moe_shared_expert_gate=False
    )
    extra = flops_per_token(config).full - flops_per_token(without).full
    assert extra == 6 * sum(shared)
    assert bool(shared) == (config.moe_shared_expert_intermediate_size is not None)


def recipe_model(name: str, vocab_size: int) -> ModelConfig:
    known = ModelConfig.__dataclass_fields__
    return model(**{k: v for k, v in RECIPES[name].items() if k in known}, vocab_size=vocab_size)


def test_published_qwen_moe() -> None:
    """Hugging Face's counts of the released weights; what a token uses as their names say."""
    qwen3 = recipe_model("qwen3-30b-a3b", 151936)
    assert parameters(qwen3) == 30_532_122_624
    assert round(active_parameters(qwen3) / 1e9, 1) == 3.4  # 3.0 without the embedding
    qwen2 = model(
        **LLAMA,
        num_layers=24,
        hidden_size=2048,
        num_attention_heads=16,
        moe_ffn_hidden_size=1408,
        num_experts=60,
        moe_router_topk=4,
        moe_router_pre_softmax=True,
        add_qkv_bias=True,
        moe_shared_expert_intermediate_size=5632,
        moe_shared_expert_gate=True,
        seq_length=4096,
        vocab_size=151936,
    )
    assert parameters(qwen2) == 14_315_784_192
    assert round(active_parameters(qwen2) / 1e9, 1) == 2.7
    assert [f.model_type for f in (family_for(qwen2), family_for(qwen3))] == [
        "qwen2_moe",
        "qwen3_moe",
    ]


def test_the_published_mixtral_is_the_recipe() -> None:
    recipe = {
        k: v for k, v in RECIPES["mixtral-8x7b"].items() if k in ModelConfig.__dataclass_fields__
    }
    config = model(**recipe, vocab_size=32000)
    assert parameters(config) == 46_702_792_704
    found = to_config(config)
    published = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    assert {key: found[key] for key in published} == published
    assert reasons(config) == []
