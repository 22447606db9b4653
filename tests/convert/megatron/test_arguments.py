"""Megatron's arguments: what they mean, and that none which matters is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.convert.megatron.argument_tables import HARMLESS, NEUTRAL
from mtk.convert.megatron.argument_writing import WRITTEN, unwritable, write_arguments
from mtk.convert.megatron.arguments import READ, model_config, true_vocabulary
from mtk.errors import ConversionError
from tests.convert.megatron.natives import MODELS

# The arguments of a real run of Llama's kind (Megatron-core 0.10, TP4 PP2), as its log prints
# them, but for data, logging and optimizer.
REAL: dict[str, Any] = {
    "add_bias_linear": False,
    "add_position_embedding": True,
    "add_qkv_bias": False,
    "apply_layernorm_1p": False,
    "apply_query_key_layer_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "apply_rope_fusion": True,
    "attention_backend": object(),
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bert_binary_head": True,
    "bert_embedder_type": "megatron",
    "bf16": True,
    "bias_dropout_fusion": True,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "clone_scatter_output_in_embedding": True,
    "cp_comm_type": ["p2p"],
    "create_attention_mask_in_dataloader": True,
    "defer_embedding_wgrad_compute": False,
    "dino_head_hidden_size": 2048,
    "encoder_num_layers": 56,
    "encoder_seq_length": 8192,
    "end_weight_decay": 0.1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 4,
    "ffn_hidden_size": 21504,
    "flash_decode": False,
    "fp32_residual_connection": False,
    "fp8": None,
    "fp8_amax_compute_algo": "most_recent",
    "fp8_wgrad": True,
    "group_query_attention": True,
    "head_lr_mult": 1.0,
    "hidden_dropout": 0.0,
    "hidden_size": 6144,
    "hybrid_attention_ratio": 0.0,
    "hybrid_mlp_ratio": 0.0,
    "hybrid_override_pattern": None,
    "init_method_std": 0.00747017,
    "initial_loss_scale": 4294967296,
    "kv_channels": 64,
    "kv_lora_rank": 32,
    "log_loss_scale_to_tensorboard": True,
    "log_params_norm": True,
    "loss_scale": None,
    "loss_scale_window": 1000,
    "make_vocab_size_divisible_by": 128,
    "masked_softmax_fusion": True,
    "max_position_embeddings": 8192,
    "min_loss_scale": 1.0,
    "moe_aux_loss_coeff": 0.0,
    "moe_ffn_hidden_size": 21504,
    "moe_layer_freq": 1,
    "moe_router_bias_update_rate": 0.001,
    "moe_router_enable_expert_bias": False,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_token_dispatcher_type": "allgather",
    "moe_token_drop_policy": "probs",
    "multi_latent_attention": False,
    "no_persist_layer_norm": False,
    "norm_epsilon": 1e-05,
    "normalization": "RMSNorm",
    "num_attention_heads": 96,
    "num_experts": None,
    "num_layers": 56,
    "num_query_groups": 24,
    "onnx_safe": None,
    "openai_gelu": False,
    "padded_vocab_size": 50688,
    "params_dtype": object(),
    "pipeline_model_parallel_size": 2,
    "position_embedding_type": "rope",
    "q_lora_rank": None,
    "qk_head_dim": 128,
    "qk_layernorm": False,
    "qk_pos_emb_head_dim": 64,
    "recompute_granularity": "selective",
    "reset_position_ids": False,
    "retro_attention_gate": 1,
    "retro_encoder_attention_dropout": 0.1,
    "rotary_base": 10000,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_scaling_factor": 1.0,
    "rotary_seq_len_interpolation_factor": None,
    "scatter_gather_tensors_in_pipeline": True,
    "seq_length": 8192,
    "sgd_momentum": 0.9,
    "spec": None,
    "squared_relu": False,
    "swiglu": True,
    "swin_backbone_type": "tiny",
    "tensor_model_parallel_size": 4,
    "tokenizer_type": "GPT2BPETokenizer",
    "transformer_impl": "transformer_engine",
    "untie_embeddings_and_output_weights": True,
    "use_flash_attn": True,
    "use_rope_scaling": False,
    "use_rotary_position_embeddings": True,
    "v_head_dim": 128,
    "vocab_size": None,
    "weight_decay": 0.1,
}


def read(**changes: Any) -> ModelConfig:
    return model_config(REAL | changes, "file (args)", rows=50688)


def test_a_real_run() -> None:
    config = read()
    assert config == make(
        ModelConfig,
        num_layers=56,
        hidden_size=6144,
        num_attention_heads=96,
        num_query_groups=24,
        ffn_hidden_size=21504,
        kv_channels=64,
        seq_length=8192,
        max_position_embeddings=8192,
        position_embedding_type="rope",
        normalization="RMSNorm",
        activation="swiglu",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.00747017,
        vocab_size=50688,
    )


@pytest.mark.parametrize(("name", "why"), [(n, why) for n, _, why in NEUTRAL], ids=lambda x: str(x))
def test_each_argument_that_changes_the_model_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConversionError, match=f"{name} = 'odd': {why}"):
        read(**{name: "odd"})


MEANINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"group_query_attention": False, "num_query_groups": 1}, {"num_query_groups": 96}),
    ({"swiglu": False, "squared_relu": True}, {"activation": "squared-relu"}),
    ({"swiglu": False}, {"activation": "gelu"}),
    ({"swiglu": False, "bias_gelu_fusion": True}, {"activation": "gelu"}),
    (
        {"swiglu": False, "bias_gelu_fusion": True, "add_bias_linear": True},
        {"activation": "gelu-tanh"},
    ),
    ({"swiglu": False, "openai_gelu": True}, {"activation": "gelu-tanh"}),
    ({"add_qkv_bias": True}, {"add_qkv_bias": True}),
    ({"rotary_percent": 0.5, "rotary_base": 500000}, {"rotary_percent": 0.5, "rotary_base": 5e5}),
    (
        {"use_rotary_position_embeddings": False, "position_embedding_type": "learned_absolute"},
        {"position_embedding_type": "learned"},
    ),
    (
        {"use_rotary_position_embeddings": False, "position_embedding_type": "none"},
        {"position_embedding_type": "none"},
    ),
    ({"vocab_size": 50257}, {"vocab_size": 50257}),
    ({"vocab_size": 50257, "tokenizer_type": "NullTokenizer"}, {"vocab_size": 50258}),
    ({"true_vocab_size": 50000, "vocab_size": 50257}, {"vocab_size": 50000}),
    (
        {"num_experts": 8, "moe_aux_loss_coeff": [0.5]},
        {"num_experts": 8, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.5},
    ),
    ({"num_experts": 8, "moe_layer_freq": [0] * 3 + [1] * 53}, {"moe_layer_freq": "[0]*3+[1]*53"}),
    ({"num_experts": 8, "moe_layer_freq": 2}, {"moe_layer_freq": "2"}),
    (
        {"num_experts": 8, "moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_router_topk": 1},
    ),
    ({"num_experts": 8, "moe_router_pre_softmax": True}, {"moe_router_pre_softmax": True}),
    (
        {"num_experts": 8, "moe_router_load_balancing_type": ["none"]},
        {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
    ),
    (
        {
            "num_experts": 8,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.01,
        },
        {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
    ),
    ({"window_size": (4095, 0)}, {"window_size": 4096}),
    ({"qk_layernorm": True, "apply_layernorm_1p": True}, {"qk_layernorm": True}),
    ({"layernorm_zero_centered_gamma": True}, {"apply_layernorm_1p": True}),
    ({"rotary_interleaved": True}, {"rotary_interleaved": True}),
    ({"use_rope_scaling": True}, {"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0}),
    (
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "true_rope_scaling_factor": 32},
        {"rope_scaling_factor": 32.0},
    ),
]


@pytest.mark.parametrize(("given", "meant"), MEANINGS, ids=str)
def test_meanings(given: dict[str, Any], meant: dict[str, Any]) -> None:
    config = read(**given)
    assert {name: getattr(config, name) for name in meant} == meant


COMPLAINTS: list[tuple[dict[str, Any], str]] = [
    ({"position_embedding_type": "yarn", "use_rotary_position_embeddings": False}, "'yarn'"),
    ({"swiglu": True, "squared_relu": True}, "swiglu and squared-relu at once"),
    ({"num_experts": 8, "moe_router_topk": 1}, "without moe_router_pre_softmax"),
    ({"window_size": (4096, -1)}, "the N tokens before and none after"),
    ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "true_rope_scaling_factor"),
    ({"num_experts": 8, "moe_router_num_groups": 2}, "moe_router_group_topk"),
    ({"num_experts": 8, "moe_layer_freq": 1.5}, "a number or a list"),
    ({"num_experts": 8, "moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn'"),
    ({"num_experts": 8, "moe_layer_freq": [0, 1] * 20}, "lists 40 layers"),
    ({"num_experts": 8, "add_bias_linear": True}, "experts have no biases"),
    ({"vocab_size": "50257"}, "vocab_size = '50257' is not of type int"),
    ({"true_vocab_size": "all"}, "true_vocab_size = 'all' is not of type int"),
    ({"num_layers": 2**70, "num_experts": 8}, "num_layers = 1180591620717411303424"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings = 1099511627776"),
    ({"vocab_size": 60000}, "60000 in an embedding of 50688 rows"),
    ({"padded_vocab_size": 50304}, "padded_vocab_size = 50304, but the embedding has 50688"),
    ({"num_layers": None}, "num_layers is missing"),
    ({"num_layers": "56"}, "'56' is not of type int"),
    ({"num_attention_heads": 95}, "num_query_groups"),
    ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping.*megatron-args"),
    ({"rope_theta_local": 1e4}, "rope_theta_local"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"use_alibi_mask": True}, "use_alibi_mask"),
]


@pytest.mark.parametrize(("given", "message"), COMPLAINTS, ids=str)
def test_complaints(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read(**given)


def test_an_unknown_argument_that_is_off_says_nothing() -> None:
    assert read(attn_logit_softcapping=None, use_alibi_mask=False, window_scale=0) == read()


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ConversionError) as caught:
        read(qk_l2_norm=True, window_size=4096, rope_scaling_factor=2.0, mtp_num_layers=1)
    listed = ("qk_l2_norm", "window_size", "mtp_num_layers")
    assert all(name in str(caught.value) for name in listed)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_again(name: str) -> None:
    config = MODELS[name]
    args = write_arguments(config, 512, 2, 2)
    again = model_config(args, "written", rows=512)
    assert again == config
    assert true_vocabulary(args, 512) == config.vocab_size


def test_every_field_of_a_model_is_written_or_refused() -> None:
    """A new option of models must be given a place here."""
    fields = set(ModelConfig.__dataclass_fields__)
    assert fields >= WRITTEN
    config = MODELS["gpt2"]
    assert list(unwritable(config)) == []
    for name in fields - WRITTEN:
        changed = object.__new__(ModelConfig)
        for field in fields:
            object.__setattr__(changed, field, getattr(config, field))
        object.__setattr__(changed, name, "something")
        assert any(reason.startswith(f"{name} = ") for reason in unwritable(changed)), name


def test_no_argument_is_in_two_tables() -> None:
    neutral = {name for name, _, _ in NEUTRAL}
    assert len(neutral) == len(NEUTRAL)
    assert not neutral & HARMLESS and not neutral & READ
