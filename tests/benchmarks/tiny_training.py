"""A training that takes milliseconds, and the families that it is measured in."""

from __future__ import annotations

from typing import Any

from mtk.config import make
from mtk.config.bench import TrainBenchConfig

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 128,  # mock data of shorter samples is a long index
    "vocab_size": 128,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "lr": 1e-3,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "device": "cpu",
    "num_threads": 1,
    "warmup": 1,
    "steps": 3,
}
LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_layer_freq": "[0,1]",
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "moe_shared_expert_gate": True,
    "add_bias_linear": False,
}


def config(**changes: Any) -> TrainBenchConfig:
    return make(TrainBenchConfig, **{**TINY, **changes})
