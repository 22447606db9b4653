"""Native models the tests of Megatron's format convert, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtk.checkpoint import load_model
from mtk.checkpoint.save import CheckpointContent
from mtk.config.model import ModelConfig
from mtk.convert.open_model import read_native
from mtk.convert.source import find_source
from mtk.models.buffers import kept_buffers, kept_tensors
from stages.convert import run
from tests.checkpoint.publish import save_checkpoint
from tests.convert.models import convert_config, gpt2_config, llama, loud_model, quiet

TOKENS_BS = torch.arange(40).view(2, 20) * 7 % 300


def mixtral(**changes: Any) -> ModelConfig:
    """Experts in every other layer, and a share of each head rotated."""
    values = {
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_layer_freq": "2",
        "num_layers": 4,
        "rotary_percent": 0.5,
    }
    return llama(**(values | changes))


MODELS: dict[str, ModelConfig] = {
    "gpt2": gpt2_config(num_layers=4, vocab_size=301),
    "gpt2-untied": gpt2_config(
        num_layers=4, activation="gelu", untie_embeddings_and_output_weights=True
    ),
    "llama": llama(num_layers=4, num_query_groups=4, untie_embeddings_and_output_weights=True),
    "llama-gqa": llama(num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=4),
    "llama-bias": llama(num_layers=4, num_query_groups=4, add_bias_linear=True, vocab_size=511),
    "qkv-bias": llama(num_layers=4, num_query_groups=4, add_qkv_bias=True, kv_channels=24),
    "squared-relu": gpt2_config(
        num_layers=4, activation="squared-relu", add_bias_linear=False, ffn_hidden_size=72
    ),
    "mixtral": mixtral(num_query_groups=4),
    "switch": mixtral(num_query_groups=4, moe_router_topk=1, moe_layer_freq="1", add_qkv_bias=True),
    "llama3": llama(num_layers=4, rope_scaling_type="llama3", rotary_base=500000.0),
    "interleaved": llama(num_layers=4, rotary_interleaved=True, rotary_percent=0.5),
    "qwen3": llama(num_layers=4, qk_layernorm=True, kv_channels=16, window_size=7),
    "norms of keys": gpt2_config(num_layers=4, qk_layernorm=True),
    "deepseek": mixtral(
        num_experts=8,
        moe_router_topk=4,
        moe_layer_freq="[0]+[1]*3",
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        moe_shared_expert_intermediate_size=24,
        moe_router_load_balancing_type="none",
    ),
    "qwen2-moe": mixtral(
        moe_router_pre_softmax=True,
        moe_shared_expert_intermediate_size=8,
        moe_shared_expert_gate=True,
    ),
    "zero-centred": llama(num_layers=4, apply_layernorm_1p=True, qk_layernorm=True),
}


def save(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint of a model whose every weight matters; its logits spread by one or two, so
    that the certificate's limit lies far from the rounding of fp32."""
    model = loud_model(config)
    with torch.no_grad():
        for parameter in model.final_norm.parameters():
            parameter.sub_(0.75 * (1 + parameter if config.apply_layernorm_1p else parameter))
        for name, buffer in kept_buffers(model).items():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.arange(len(buffer)) % 3 / 10)
    content = CheckpointContent(config, kept_tensors(model))
    save_checkpoint(folder, content, stage="pretrain", config=config, inputs=[], metrics={})
    return folder


def to_megatron(load: Path, save: Path, tensor: int, pipeline: int, **options: Any) -> Path:
    """Convert for a layout."""
    sizes = {
        "target_tensor_parallel_size": tensor,
        "target_pipeline_parallel_size": pipeline,
        "to": "megatron",
    }
    return run(convert_config(load, save, **(sizes | options)), quiet()).path


def to_native(load: Path, save: Path, **options: Any) -> Path:
    """Convert back."""
    return run(convert_config(load, save, to="native", **options), quiet()).path


def logits(native: Path) -> Tensor:
    """[B, S, V] of :data:`TOKENS_BS`."""
    with torch.no_grad():
        return load_model(native).model(TOKENS_BS)


def assert_same_weights(ours: Path, theirs: Path, padded: tuple[str, ...] = ()) -> None:
    """Bit for bit, but for rows of padding. padded: names that have such beside the matrices."""
    (config, before), (_, after) = (read_native(find_source(path)) for path in (ours, theirs))
    assert before.keys() == after.keys()
    for name in before:
        mine, other = before[name], after[name]
        if name in ("embedding.tokens.weight", "output.weight", *padded):
            mine, other = mine[: config.vocab_size], other[: config.vocab_size]
        assert torch.equal(mine, other), name
