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
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIASED = {**SIGMOID, "moe_router_enable_expert_bias": True}
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
        ({"moe_layer_freq": "[0,1]"}, ["lists 2 layers; num_layers = 4", "Nearest: [0]+[1]*3"]),
        ({"moe_layer_freq": "[0]*4"}, ["no layer any experts", "Nearest: [0]*3+[1]"]),
        ({"moe_layer_freq": "[2]*4"}, ["lists of 0 and 1", "Nearest: 1"]),
        ({"moe_layer_freq": "__import__('os')"}, ["lists of 0 and 1"]),
        ({"moe_router_pre_softmax": True, **SIGMOID}, ["moe_router_pre_softmax", "softmax"]),
        ({"moe_router_topk_scaling_factor": 0.0}, ["scaling_factor = 0.0", "Nearest: 1.0"]),
        (
            {**SIGMOID, "moe_router_num_groups": 3, "moe_router_group_topk": 1},
            ["moe_router_num_groups = 3", "divide num_experts = 8", "Nearest: 2 or 4"],
        ),
        (
            {**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 3},
            ["moe_router_group_topk = 3", "divide moe_router_topk = 2", "Nearest: 2"],
        ),
        (
            {
                **SIGMOID,
                "moe_router_topk": 6,
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
            },
            ["groups of 2 experts must hold the 6", "Nearest: 3"],
        ),
        ({"moe_router_num_groups": 4}, ["moe_router_num_groups = 4", "--moe-router-group-topk"]),
        ({"moe_router_group_topk": 2}, ["moe_router_group_topk = 2", "--moe-router-num-groups"]),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
            ["--moe-router-pre-softmax", "sigmoid"],
        ),
        ({"moe_router_enable_expert_bias": True}, ["enable_expert_bias", "--moe-router-score"]),
        ({"moe_router_bias_update_rate": 0.1}, ["bias_update_rate = 0.1", "enable_expert_bias"]),
        (
            {**BIASED, "moe_router_bias_update_rate": -1.0},
            ["moe_router_bias_update_rate = -1.0", "0 or more"],
        ),
        (
            {**BIASED, "moe_router_load_balancing_type": "sinkhorn"},
            ["moe_router_enable_expert_bias", "sinkhorn both decide"],
        ),
        (
            {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.1},
            ["moe_aux_loss_coeff = 0.1", "Nearest: 0"],
        ),
        (
            {"moe_router_load_balancing_type": "aux_loss"},
            ["moe_router_load_balancing_type", "'seq_aux_loss'"],
        ),
        (
            {
                **SIGMOID,
                "moe_router_load_balancing_type": "sinkhorn",
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
            },
            ["moe_router_load_balancing_type = 'sinkhorn'", "groups"],
        ),
        ({"moe_shared_expert_intermediate_size": 0}, ["intermediate_size = 0", "at least 1"]),
        ({"moe_shared_expert_gate": True}, ["moe_shared_expert_gate", "intermediate_size"]),
        (
            {"num_experts": None, "moe_shared_expert_intermediate_size": 8},
            ["moe_shared_expert_intermediate_size = 8", "num_experts"],
        ),
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
        (
            {"tensor_model_parallel_size": 2, "moe_shared_expert_intermediate_size": 7},
            ["tensor_model_parallel_size = 2", "intermediate_size = 7", "Nearest: 1"],
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
    assert moe.moe_aux_loss_coeff == 0.01 and dense.moe_aux_loss_coeff is None
    quiet = make(ModelConfig, **MODEL, moe_router_load_balancing_type="none")
    assert quiet.moe_aux_loss_coeff == 0.0
    for text in ("[0]+[1]*3", "([0] + [1]*3)", "([0])+3*[1]", "[0,1, 1,1]"):
        first = make(ModelConfig, **MODEL, moe_layer_freq=text)
        assert [first.has_experts(layer) for layer in range(4)] == [False, True, True, True]
        assert first.moe_layers == 3
    every_third = make(ModelConfig, **MODEL, moe_layer_freq=3)
    assert [every_third.has_experts(layer) for layer in range(4)] == [True, False, False, True]
