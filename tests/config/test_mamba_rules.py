"""Every violated rule of patterns and Mamba layers is named, with the nearest legal value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError

MODEL: dict[str, Any] = {
    "hybrid_layer_pattern": "M-M*",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "position_embedding_type": "none",
    "add_bias_linear": False,
}
PURE = {"hybrid_layer_pattern": "MM", "num_attention_heads": 1}
RUN = {"mock_data": True, "vocab_size": 64, "train_iters": 1, "save": "unused", "lr": 1e-3}
NO_MAMBA = {"hybrid_layer_pattern": "*-*-", "mamba_head_dim": 64, "mamba_num_groups": 8}


def complaint(config_class: type, values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        make(config_class, **values)
    return str(caught.value)


def test_the_pattern_says_how_many_layers() -> None:
    config = make(ModelConfig, **MODEL)
    assert (config.num_layers, config.mamba_num_heads) == (4, 8)
    pure = {k: v for k, v in (MODEL | PURE).items() if k != "num_attention_heads"}
    config = make(ModelConfig, **pure)
    assert (config.num_layers, config.num_attention_heads) == (2, 1)
    assert [config.has_mamba, config.has_attention, config.has_mlp] == [True, False, False]
    # A resolved configuration is given back as it is.
    assert make(ModelConfig, **dataclasses.asdict(config)) == config
    with pytest.raises(ConfigError, match="num_attention_heads = None: must be given"):
        make(ModelConfig, **{k: v for k, v in MODEL.items() if k != "num_attention_heads"})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hybrid_layer_pattern": ""}, ["names no layer", "M (Mamba-2)"]),
        ({"hybrid_layer_pattern": "MxM*"}, ["'x' is no kind of layer", "- (MLP)"]),
        ({"hybrid_layer_pattern": "MM|M*"}, ["'|' cuts stages", "--pipeline-split"]),
        ({"hybrid_layer_pattern": "MG*/M"}, ["'G' is a gated delta net", "multi-token"]),
        ({"num_layers": 7}, ["num_layers = 7", "the pattern's 4 layers", "Leave it out"]),
        ({"family": "bert"}, ["family bert has layers of one kind"]),
        ({"hybrid_layer_pattern": "ME"}, ["layers of experts", "num_experts is None"]),
        ({"num_experts": 4}, ["no layer of experts (E)", "num_experts is 4"]),
        (
            {"hybrid_layer_pattern": "ME*E", "num_experts": 4, "moe_layer_freq": 2},
            ["moe_layer_freq = '2'", "already says"],
        ),
        ({"mamba_num_groups": 3}, ["mamba_num_groups = 3", "8 heads", "Nearest: 2"]),
        ({"mamba_head_dim": 12}, ["mamba_head_dim = 12", "2 x hidden_size = 64", "8 or 16"]),
        ({"mamba_state_dim": 0}, ["mamba_state_dim = 0", "Nearest: 1"]),
        ({"mamba_conv_width": 1}, ["mamba_conv_width = 1", "Nearest: 2"]),
        ({"mamba_chunk_size": 0}, ["mamba_chunk_size = 0"]),
        ({"mamba_num_heads": 0}, ["mamba_num_heads = 0"]),
        ({"mamba_dt_range": (0.1, 0.01)}, ["mamba_dt_range", "the lower one first"]),
        ({"mamba_a_range": (0.0, 1.0)}, ["mamba_a_range", "greater than 0"]),
        ({"mamba_dt_floor": 0.0}, ["mamba_dt_floor"]),
        ({"mamba_dt_limit": (0.5, 0.5)}, ["mamba_dt_limit", "Leave it out"]),
        (PURE | {"position_embedding_type": "rope"}, ["only means something with attention"]),
        (PURE | {"num_attention_heads": 4}, ["num_attention_heads = 4", "of which"]),
        (PURE | {"add_qkv_bias": True}, ["add_qkv_bias = True"]),
        (PURE | {"window_size": 4, "qk_layernorm": True}, ["window_size = 4", "qk_layernorm"]),
        (PURE | {"position_embedding_type": "alibi"}, ["= 'alibi'", "with attention"]),
        (PURE | {"add_mlp_bias": True}, ["add_mlp_bias = True", "(-)"]),
        ({"use_parallel_residual": True}, ["use_parallel_residual", "has one"]),
        (PURE | {"ffn_hidden_size": 64}, ["ffn_hidden_size = 64", "with an MLP"]),
        (NO_MAMBA | {"mamba_state_dim": 64}, ["mamba_state_dim = 64", "with Mamba layers"]),
        (
            NO_MAMBA | {"hybrid_layer_pattern": None, "num_layers": 2, "mamba_num_heads": 2},
            ["mamba_num_heads = 2", "with Mamba layers"],
        ),
    ],
    ids=str,
)
def test_model_rules(values: dict[str, Any], expected: list[str]) -> None:
    found = complaint(ModelConfig, MODEL | values)
    assert all(part in found for part in expected), found


TP, CP = "tensor_model_parallel_size", "context_parallel_size"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (PURE | {TP: 3, "nproc": 3}, ["must divide model.mamba_num_heads = 8", "2 or 4"]),
        (
            PURE | {"mamba_num_heads": 12, "mamba_num_groups": 4, TP: 6, "nproc": 6},
            ["multiple of model.mamba_num_groups = 4", "Nearest: 4 or 12"],
        ),
        ({TP: 8, "nproc": 8}, ["must not exceed model.num_attention_heads = 4"]),
        (PURE | {CP: 16, "nproc": 16, "seq_length": 64}, ["8 Mamba heads of a rank", "8"]),
        (
            PURE | {"mamba_num_heads": 36, "mamba_num_groups": 4, CP: 6, "nproc": 6,
                    "seq_length": 48},
            ["multiple of the 4 Mamba groups", "Nearest: 4 or 8"],
        ),
        (PURE | {CP: 2, "nproc": 2, "cp_comm_type": "a2a"}, ["cp_comm_type = 'a2a'", "Leave it"]),
        ({"mamba_backend": "mamba-ssm", "device": "cpu"}, ["kernels for CUDA only"]),
        (
            {"mamba_backend": "mamba-ssm", "deterministic_mode": True},
            ["adds up gradients in any order"],
        ),
        (NO_MAMBA | {"mamba_backend": "mamba-ssm"}, ["of which the model has none"]),
    ],
    ids=str,
)  # fmt: skip
def test_layout_rules(values: dict[str, Any], expected: list[str]) -> None:
    base = {"attention_dropout": 0.0, "global_batch_size": 48}
    found = complaint(PretrainConfig, MODEL | RUN | base | values)
    assert all(part in found for part in expected), found


@pytest.mark.parametrize(
    "values",
    [
        PURE | {TP: 8, "nproc": 8},  # more ranks than groups, and than any attention's heads
        PURE | {CP: 8, "nproc": 8},
        PURE | {TP: 2, CP: 4, "nproc": 8, "attention_dropout": 0.1},
        {"num_attention_heads": 4, TP: 4, "nproc": 4},
    ],
    ids=str,
)
def test_legal_layouts(values: dict[str, Any]) -> None:
    make(PretrainConfig, **MODEL | RUN | {"attention_dropout": 0.0} | values)
