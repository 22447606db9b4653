"""Megatron's arguments, by what they do to the function a model computes.

``NEUTRAL``: change it, and mtk's model can only be the one with these values. ``HARMLESS``:
sound like the model but do not change what it computes, or mean nothing without an argument
of the first list. Any other argument that sounds like the model and is set stops a
conversion, so that no version of Megatron can add one that is passed over in silence.
"""

from __future__ import annotations

import re

# Name, values under which the model is one that mtk has, what it would be otherwise.
NEUTRAL: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("apply_residual_connection_post_layernorm", (False,), "mtk's blocks have the norm first"),
    ("attention_output_gate", (False,), "gated attention is not supported"),
    ("attention_sink_k", (0,), "attention sinks are not supported"),
    ("experimental_attention_variant", (None,), "only softmax attention is supported"),
    ("linear_attention_type", (None,), "only softmax attention is supported"),
    ("linear_attention_freq", (None,), "only softmax attention is supported"),
    ("multi_latent_attention", (False,), "latent attention is not supported"),
    ("qk_l2_norm", (False,), "norms of queries and keys are not supported"),
    ("softmax_scale", (None,), "scores are divided by the root of the head's size"),
    ("softmax_type", ("vanilla",), "only the plain softmax is supported"),
    ("use_softmax_one", (False,), "only the plain softmax is supported"),
    ("window_attn_skip_freq", (None,), "a window in some layers only is not supported"),
    ("attention_head_type", ("multihead",), "groups are given by num_query_groups"),
    ("parallel_attn", (False,), "attention and MLP side by side are not supported"),
    ("mrope_section", (None,), "mtk rotates by one position"),
    ("no_rope_freq", (None,), "layers without rotation are not supported"),
    (
        "rotary_seq_len_interpolation_factor",
        (None, 1),
        "some versions of Megatron's GPT pass over it; what the model computes is not known",
    ),
    ("rope_type", ("rope",), "this kind of scaled rope is not supported"),
    ("activation_func_clamp_value", (None,), "clamped activations are not supported"),
    ("geglu", (False,), "of the gated activations only swiglu is supported"),
    ("glu_activation", (None,), "of the gated activations only swiglu is supported"),
    ("glu_linear_offset", (0,), "of the gated activations only swiglu is supported"),
    ("quick_geglu", (False,), "of the gated activations only swiglu is supported"),
    ("reglu", (False,), "of the gated activations only swiglu is supported"),
    ("xielu", (False,), "this activation is not supported"),
    ("embed_layernorm", (False,), "a norm after the embedding is not supported"),
    ("embedding_layernorm", (False,), "a norm after the embedding is not supported"),
    ("use_mup", (False,), "width multipliers are not supported"),
    ("heterogeneous_layers_config_path", (None,), "layers must be alike"),
    ("heterogeneous_layers_config_encoded_json", (None,), "layers must be alike"),
    ("hybrid_layer_pattern", (None,), "hybrids are not supported"),
    ("hybrid_override_pattern", (None,), "hybrids are not supported"),
    ("hybrid_attention_ratio", (0,), "hybrids are not supported"),
    ("hybrid_mlp_ratio", (0,), "hybrids are not supported"),
    ("is_hybrid_model", (False,), "hybrids are not supported"),
    ("mtp_num_layers", (None, 0), "further predicted tokens are not supported"),
    ("retro_add_retriever", (False,), "Retro is not supported"),
    ("spec", (None,), "a layer specification of one's own may compute anything"),
    ("moe_apply_probs_on_input", (False,), "experts are weighted at their outputs"),
    ("moe_expert_capacity_factor", (None,), "Megatron drops tokens outside training too"),
    ("moe_input_jitter_eps", (None, 0), "noise on the router is not supported"),
    ("moe_latent_size", (None,), "experts of another width are not supported"),
    ("moe_router_force_load_balancing", (False,), "the router must choose"),
    ("moe_router_topk_limited_devices", (None,), "groups of experts are not supported"),
)
# With these, and only these, routing is the plain choice of the largest logits.
BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def words(text: str) -> frozenset[str]:
    """A list of names, as it is easiest to read."""
    return frozenset(text.split())


HARMLESS = words(
    """
    add_position_embedding apply_query_key_layer_scaling apply_rope_fusion attention_backend
    attention_softmax_in_fp32 bert_embedder_type bert_embedding_path bias_dropout_fusion
    bias_swiglu_fusion check_weight_hash_across_dp_replicas_interval
    clone_scatter_output_in_embedding create_attention_mask_in_dataloader
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_num_layers
    decoupled_lr defer_embedding_wgrad_compute dino_head_hidden_size dino_norm_last_layer
    disable_te_fused_rope embedding_init_method_std embedding_path
    embedding_weights_in_optimizer encoder_num_layers expert_model_parallel_size
    expert_tensor_parallel_size first_last_layers_bf16 fp32_residual_connection
    fp8_dot_product_attention fp8_multi_head_attention fused_padded_mla_attention
    fused_single_qkv_rope head_lr_mult ict_head_size init_method_std initial_loss_scale
    kv_channels kv_lora_rank linear_key_head_dim
    linear_num_key_heads linear_num_value_heads linear_value_head_dim
    log_loss_scale_to_tensorboard log_max_attention_logit log_params_norm loss_scale
    loss_scale_window mamba_head_dim mamba_num_heads masked_softmax_fusion
    memory_efficient_layer_norm min_loss_scale mla_down_proj_fusion moe_aux_loss_coeff
    moe_deepep_num_sms moe_enable_deepep moe_extended_tp moe_flex_dispatcher_backend
    moe_grouped_gemm moe_hybridep_num_sms moe_hybridep_routing_map_mode moe_layer_recompute
    moe_pad_expert_input_to_capacity moe_per_layer_logging moe_permute_fusion moe_router_dtype
    moe_router_fusion moe_router_padding_for_fp8 moe_router_padding_for_quantization
    moe_shared_expert_overlap moe_single_grouped_bias moe_single_grouped_weight
    moe_token_dispatcher_type moe_token_drop_policy moe_token_dropping moe_upcycling_granularity
    moe_use_legacy_grouped_gemm moe_use_upcycling moe_z_loss_coeff mtp_loss_scaling_factor
    no_load_rng no_persist_layer_norm no_rope_fusion no_save_rng norm_epsilon
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage
    optimizer_offload_fraction original_max_position_embeddings original_rotary_base
    output_bert_embeddings persist_layer_norm qk_clip qk_clip_alpha qk_clip_threshold
    qk_head_dim qk_pos_emb_head_dim recompute_num_layers reset_attention_mask reset_position_ids
    retriever_score_scaling retro_attention_gate retro_encoder_attention_dropout
    retro_encoder_layers rotary_scaling_factor scaled_masked_softmax_fusion
    scatter_gather_tensors_in_pipeline use_flash_attn use_flash_attn_triton use_flash_attn_v1
    use_flash_attn_v2 use_rotary_position_embeddings v_head_dim
    """
)
SOUNDS_LIKE_THE_MODEL = re.compile(
    r"attention|attn|rope|rotary|norm|softmax|softcap|embed|alibi|window|logit_|_logit|scal(e|ing)"
    r"|moe_|router|expert|activation|glu|gelu|relu|mup_|mla_|qk_|qkv|kv_|residual|head_|_head"
    r"|multiplier|position|sink|mamba|hybrid|retro_add"
)
# What these begin with has nothing to do with a language model.
OTHER_TASKS = ("vision_", "dino_", "biencoder_", "ict_", "bert_", "retro_", "one_logger_", "fp8_")
