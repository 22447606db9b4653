"""``config.json`` of published models, with all that they say besides, read in full.

How many parameters a model has is known, and tells whether its sizes, biases, norms and tied
matrices were understood; what does not change the number is asked for by name.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mtk.config.model import ModelConfig
from mtk.convert.families import family_of
from mtk.convert.family import ForeignConfig, own_keys
from mtk.models.build import build_on_meta

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
ROPE_OF_LLAMA_3 = {
    "rotary_base": 5e5,
    "rope_scaling_type": "llama3",
    "rope_original_max_positions": 8192,
    "norm_epsilon": 1e-5,
}
QWEN3 = {"rotary_base": 1e6, "qk_layernorm": True, "window_size": None, "norm_epsilon": 1e-6}
FLAN: dict[str, Any] = {"activation": "geglu-tanh", "scale_tied_output": False}
# Parameters, and what does not show in them.
KNOWN: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-2-7b": (6_738_415_616, {"rotary_base": 1e4, "positions": 4096, "norm_epsilon": 1e-5}),
    "Llama-3.1-8B": (8_030_261_248, ROPE_OF_LLAMA_3 | {"rope_scaling_factor": 8.0}),
    "Llama-3.2-1B": (1_235_814_400, ROPE_OF_LLAMA_3 | {"rope_scaling_factor": 32.0}),
    "Mistral-7B-v0.1": (7_241_732_096, {"window_size": 4096, "rotary_base": 1e4}),
    "Mistral-7B-v0.3": (7_248_023_552, {"window_size": None, "rotary_base": 1e6}),
    "Mixtral-8x7B-v0.1": (46_702_792_704, {"window_size": None, "moe_router_topk": 2}),
    "Qwen2-0.5B": (494_032_768, {"window_size": None, "rotary_base": 1e6}),
    "Qwen2.5-7B": (7_615_616_512, {"window_size": None, "norm_epsilon": 1e-6}),
    "Qwen3-0.6B": (596_049_920, QWEN3),
    "Qwen3-8B": (8_190_735_360, QWEN3),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        QWEN3 | {"moe_router_topk": 8, "moe_router_pre_softmax": False},
    ),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {"moe_router_topk": 4, "moe_router_pre_softmax": True}),
    "GLM-4.5-Air": (
        106_852_245_504,
        {"rotary_percent": 0.5, "moe_router_topk": 8, "moe_router_topk_scaling_factor": None},
    ),
    "gemma-2b": (2_506_172_416, {"activation": "geglu-tanh", "scale_embeddings": True}),
    "pythia-70m": (70_426_624, {"rotary_percent": 0.25, "activation": "gelu"}),
    "gpt-neox-20b": (20_554_567_680, {"use_parallel_residual": True, "activation": "gelu-tanh"}),
    "bloom-560m": (559_214_592, {"position_embedding_type": "alibi", "num_attention_heads": 16}),
    "gpt2": (124_439_808, {"activation": "gelu-tanh", "norm_epsilon": 1e-5}),
    "bert-base-uncased": (109_514_298, {"activation": "gelu", "norm_epsilon": 1e-12}),
    "t5-small": (60_506_624, {"activation": "relu", "scale_tied_output": True}),
    "t5-3b": (2_851_598_336, {"activation": "relu", "scale_tied_output": True}),
    "t5-v1_1-small": (76_961_152, FLAN),
    "flan-t5-small": (76_961_152, FLAN),
    "mamba2-130m-hf": (128_989_632, {"mamba_dt_limit": None}),
    "Mamba-Codestral-7B": (7_285_403_648, {"mamba_num_groups": 8, "mamba_dt_limit": None}),
}


def understood(data: dict[str, Any], where: str) -> ModelConfig:
    family = family_of(data["model_type"], where)
    return family.from_config(ForeignConfig(own_keys(data, family.aliases, where), where))


@pytest.mark.parametrize("name", PUBLISHED)
def test_read_in_full(name: str) -> None:
    config = understood(PUBLISHED[name], name)
    count, values = KNOWN[name]
    small = {"make_vocab_size_divisible_by": 1}
    if config.position_embedding_type == "rope":
        # Tables of a hundred thousand angles are no parameters.
        small |= {"seq_length": 64, "max_position_embeddings": 64}
    model = build_on_meta(dataclasses.replace(config, **small))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {key: getattr(config, key) for key in values} == values
    # What is written of it says the same, and nothing stands against writing it.
    family = family_of(PUBLISHED[name]["model_type"], name)
    assert family.reasons(config) == []
    assert understood(json.loads(json.dumps(family.to_config(config))), name) == config
