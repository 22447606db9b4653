"""Tiny configurations and one step of them on ranks, for the parity tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.parallel.dims import Dims
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.verification.compare import Difference, compare
from mtk.verification.observe import Observation, observe, random_sample
from tests.parallel.ranks import run_ranks

DENSE: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 8,
    "model.num_query_groups": 2,
    "model.ffn_hidden_size": 48,
    "model.seq_length": 16,
    "model.vocab_size": 61,
    "model.make_vocab_size_divisible_by": 16,
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.add_qkv_bias": True,
    "data.mock_data": True,
    "batch.micro_batch_size": 1,
    "batch.global_batch_size": 8,
    "length.train_iters": 10,
    "optimizer.lr": 1e-3,
    "checkpoint.save": "unused",
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "model.position_embedding_type": "rope",
        "model.normalization": "RMSNorm",
        "model.activation": "swiglu",
        "model.add_bias_linear": False,
        "model.untie_embeddings_and_output_weights": True,
    },
    # Scaled, partial and interleaved rotation, parallel residuals, all biases.
    "neox": {
        "model.position_embedding_type": "rope",
        "model.rotary_percent": 0.5,
        "model.rotary_interleaved": True,
        "model.rope_scaling_type": "linear",
        "model.rope_scaling_factor": 3.0,
        "model.use_parallel_residual": True,
        "model.add_qkv_bias": False,
        "model.num_query_groups": 8,
    },
    "qwen3": {
        "model.position_embedding_type": "rope",
        "model.rope_scaling_type": "llama3",
        "model.rope_original_max_positions": 8,
        "model.normalization": "RMSNorm",
        "model.activation": "swiglu",
        "model.add_bias_linear": False,
        "model.qk_layernorm": True,
        "model.kv_channels": 6,
    },
    # A sliding window, and all that Gemma does otherwise; biases in the attention alone.
    "gemma": {
        "model.position_embedding_type": "rope",
        "model.normalization": "RMSNorm",
        "model.activation": "geglu-tanh",
        "model.add_bias_linear": False,
        "model.add_qkv_bias": False,
        "model.add_attention_bias": True,
        "model.apply_layernorm_1p": True,
        "model.scale_embeddings": True,
        "model.qk_layernorm": True,
        "model.window_size": 5,
    },
    "bloom": {
        "model.position_embedding_type": "alibi",
        "model.embedding_layernorm": True,
        "model.num_query_groups": 8,
    },
}
_MAMBA: dict[str, Any] = {
    "model.position_embedding_type": "none",
    "model.normalization": "RMSNorm",
    "model.mamba_num_heads": 8,
    "model.mamba_head_dim": 6,
    "model.mamba_state_dim": 10,
    "model.mamba_num_groups": 2,
    "model.mamba_chunk_size": 5,
    # As long as the sequence, or states would say little.
    "model.mamba_a_range": (0.1, 2.0),
}
KINDS["mamba"] = {
    **_MAMBA,
    "model.hybrid_layer_pattern": "MMMM",
    "model.add_bias_linear": False,
    "model.untie_embeddings_and_output_weights": True,
}
KINDS["hybrid"] = {**_MAMBA, "model.hybrid_layer_pattern": "M-M*-M"}
KINDS["hybrid-moe"] = {
    **_MAMBA,
    "model.hybrid_layer_pattern": "ME*M",
    "model.add_bias_linear": False,
    "model.num_experts": 4,
    "model.moe_ffn_hidden_size": 32,
    "model.moe_aux_loss_coeff": 0.3,
}
# Of DENSE, what the pattern says instead.
_BY_PATTERN = {
    "mamba": ("num_layers", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
              "add_qkv_bias"),
    "hybrid": ("num_layers",),
    "hybrid-moe": ("num_layers", "ffn_hidden_size"),
}  # fmt: skip


def configure(
    kind: str = "gpt2", world: int = 1, changes: Mapping[str, Any] | None = None, /, **layout: Any
) -> PretrainConfig:
    """A tiny run on ``world`` ranks; ``layout`` are fields of ParallelConfig, ``changes`` any
    others."""
    layout |= {"nproc": world}
    values = (
        DENSE
        | KINDS[kind]
        | dict(changes or {})
        | {f"parallel.{name}": v for name, v in layout.items()}
    )
    for name in _BY_PATTERN.get(kind, ()):
        values.pop(f"model.{name}", None)
    return make(PretrainConfig, **values)


def step_on_rank(rank: int, config: PretrainConfig, world: int, steps: int = 1) -> Observation:
    dims = Dims.of(config.parallel, world)
    ranks = make_ranks(
        dims,
        rank=rank,
        device=torch.device("cpu"),
        kv_groups=config.model.query_groups,
        state_groups=config.model.state_groups,
        sharded=config.parallel.data_parallel_sharding != "replicate",
    )
    return observe(config, random_sample(config), ranks, steps)


@lru_cache(maxsize=8)
def one_process(config: PretrainConfig, steps: int) -> Observation:
    return observe(config, random_sample(config), Ranks(), steps)


def difference(config: PretrainConfig, steps: int = 1) -> Difference:
    """A step in the configured layout against one process."""
    world = config.parallel.nproc
    single = dataclasses.replace(config, parallel=make(type(config.parallel)))
    one = one_process(single, steps)
    return compare(one, run_ranks(world, step_on_rank, config, world, steps))
