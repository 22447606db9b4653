"""Where blocks are compiled unless somebody says, and where the compiler keeps what it made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.training.compiled import CACHE, compiles, keep_compiled

MAMBA = {
    "hybrid_layer_pattern": "M*",
    "mamba_head_dim": 16,
    "mamba_state_dim": 16,
    "mamba_num_groups": 4,
    "position_embedding_type": "none",
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(**changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "vocab_size": 97,
        "mock_data": True,
        "train_iters": 1,
        "lr": 1e-3,
        "save": "unused",
    }
    return make(PretrainConfig, **(values | changes))


@pytest.mark.parametrize(
    ("changes", "on_cuda"),
    [
        ({}, True),
        ({"compile": False}, False),
        ({"compile": True, "deterministic_mode": True}, True),
        ({"deterministic_mode": True}, False),
        ({"num_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}, True),
        (MAMBA, False),
    ],
    ids=str,
)
def test_the_default_is_where_it_is_known_to_work(changes: dict[str, Any], on_cuda: bool) -> None:
    own = config(**changes)
    assert compiles(own, CUDA) is on_cuda
    assert compiles(own, CPU) is bool(own.runtime.compile)


def test_delayed_weight_gradients_are_not_compiled() -> None:
    layout = {"pipeline_model_parallel_size": 2, "nproc": 2, "global_batch_size": 2}
    for schedule, expected in (("1f1b", True), ("zero-bubble", False)):
        assert compiles(config(**layout, pipeline_schedule=schedule), CUDA) is expected


def test_the_cache_outlives_the_folder_for_temporary_files() -> None:
    own = {"XDG_CACHE_HOME": "/somewhere/cache"}
    keep_compiled(own)
    assert own[CACHE] == "/somewhere/cache/mtk/inductor"
    chosen = {CACHE: "/mine"}
    keep_compiled(chosen)
    assert chosen == {CACHE: "/mine"}
