"""Every violated MoE rule is named, with the nearest legal value."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "add_bias_linear": False,
    "num_experts": 8,
}
RUN = {"mock_data": True, "vocab_size": 50, "train_iters": 1, "save": "unused", "lr": 1e-3}


def complaint(config_class: type, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(config_class, **MODEL | values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_experts": 1}, ["num_experts = 1", "Nearest: 2"]),
        ({"num_experts": 0}, ["num_experts = 0", "Nearest: 2"]),
        ({"moe_router_topk": 9}, ["moe_router_topk = 9", "1..num_experts = 8", "Nearest: 8"]),
        ({"moe_router_topk": 0}, ["moe_router_topk = 0", "Nearest: 1"]),
        ({"moe_layer_freq": 0}, ["moe_layer_freq = 0", "Nearest: 1"]),
        ({"moe_layer_freq": 5}, ["moe_layer_freq = 5", "num_layers = 4", "Nearest: 4"]),
        ({"moe_aux_loss_coeff": -0.1}, ["moe_aux_loss_coeff = -0.1"]),
        ({"moe_z_loss_coeff": float("inf")}, ["moe_z_loss_coeff"]),
        ({"moe_expert_capacity_factor": 0.0}, ["moe_expert_capacity_factor = 0.0", "Nearest: 1.0"]),
        ({"moe_ffn_hidden_size": 100}, ["moe_ffn_hidden_size = 100", "multiple of 8", "96"]),
        ({"moe_ffn_hidden_size": 0}, ["moe_ffn_hidden_size = 0", "Nearest: 8"]),
        ({"hidden_size": 36}, ["hidden_size = 36", "multiple of 8", "Nearest: 32"]),
        ({"add_bias_linear": True}, ["add_bias_linear", "--disable-bias-linear"]),
        ({"family": "bert"}, ["num_experts = 8", "bert"]),
        ({"num_experts": None, "moe_router_topk": 3}, ["moe_router_topk = 3", "num_experts"]),
        ({"num_experts": None, "moe_aux_loss_coeff": 0.0}, ["moe_aux_loss_coeff = 0.0"]),
        ({"num_experts": None, "moe_expert_capacity_factor": 2.0}, ["capacity_factor = 2.0"]),
    ],
    ids=str,
)
def test_model_rules(values: dict[str, Any], expected: list[str]) -> None:
    found = complaint(ModelConfig, **values)
    assert all(part in found for part in expected), found


def test_all_at_once() -> None:
    found = complaint(ModelConfig, moe_router_topk=9, moe_layer_freq=0, moe_aux_loss_coeff=-1.0)
    assert found.startswith("3 problems")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"expert_model_parallel_size": 3}, ["expert_model_parallel_size = 3", "num_experts = 8"]),
        (
            {"num_experts": None, "expert_model_parallel_size": 2},
            ["expert_model_parallel_size = 2", "no experts"],
        ),
        (
            {"tensor_model_parallel_size": 2, "moe_ffn_hidden_size": 24},
            ["tensor_model_parallel_size = 2", "an expert's MLP, 24", "Nearest: 1"],
        ),
    ],
    ids=str,
)
def test_layout_rules(values: dict[str, Any], expected: list[str]) -> None:
    found = complaint(PretrainConfig, **RUN | values)
    assert all(part in found for part in expected), found


def test_derived_and_resolved_again() -> None:
    moe = make(ModelConfig, **MODEL, ffn_hidden_size=48)
    assert moe.moe_ffn_hidden_size == 48 and moe.moe_layers == 4
    dense = make(ModelConfig, **MODEL | {"num_experts": None})
    assert dense.moe_ffn_hidden_size is None and dense.moe_layers == 0
    for config in (moe, dense):
        assert make(ModelConfig, **vars(config)) == config
    every_third = make(ModelConfig, **MODEL, moe_layer_freq=3)
    assert [every_third.has_experts(layer) for layer in range(4)] == [True, False, False, True]
