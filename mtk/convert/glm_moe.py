"""GLM-4.5 (GLM team 2025) in the layout of transformers' ``Glm4MoeForCausalLM``: DeepSeek-V3's
router (sigmoids, biases of experts, groups), a shared expert and dense first layers around an
attention that rotates half of each head."""

from __future__ import annotations

from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert import expert_layers, gated_decoder
from mtk.convert.family import Family, ForeignConfig, bias_options, bias_reasons, reasons_against
from mtk.convert.lazy import Tensors
from mtk.convert.mapping import Rename, Rule, WeightTable
from mtk.convert.rope import Spelling

MLP = "mlp"
ROPE = Spelling(default_percent=0.5, partial=True)
# Experts whose scores rate a group there.
RATED = 2


def reasons(config: ModelConfig) -> list[str]:
    """Everything that keeps ``config`` from being a GLM-4-MoE."""
    name = "GLM-4-MoE"
    takes = gated_decoder.takes() | gated_decoder.takes_rope(config) | expert_layers.takes(config)
    for option in (
        "rotary_percent",
        "qk_layernorm",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_group_topk",
    ):
        takes[option] = ((getattr(config, option),), "")
    takes["moe_router_score_function"] = (("sigmoid",), "scores by sigmoids")
    takes["moe_router_enable_expert_bias"] = ((True,), "has biases of experts")
    width, each = config.moe_shared_expert_intermediate_size, config.moe_ffn_size
    takes["moe_shared_expert_intermediate_size"] = ((width or -1,), "has a shared expert")
    found = reasons_against(config, name, takes)
    if config.num_experts is None:
        return found + bias_reasons(config, name, ((True, False, False), (False, False, False)))
    if width and width % each:
        found.append(
            f"moe_shared_expert_intermediate_size = {width}: {name}'s is a multiple of an "
            f"expert's width, {each}"
        )
    layers = [config.has_experts(i) for i in range(config.num_layers)]
    if layers != sorted(layers):
        freq = config.moe_layer_freq
        found.append(f"moe_layer_freq = {freq}: {name}'s dense layers are the first ones")
    chosen = config.moe_router_group_topk
    if chosen and config.moe_router_topk // chosen != RATED:
        found.append(
            f"moe_router_group_topk = {chosen}: {name} rates a group by its best {RATED} experts, "
            f"so that it must be {config.moe_router_topk} / {RATED}"
        )
    found += expert_layers.normalised_reasons(config, name)
    return found + bias_reasons(config, name, ((True, False, False), (False, False, False)))


def to_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of ``config.json``."""
    width = config.moe_shared_expert_intermediate_size or 0
    return {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_layernorm,
        **gated_decoder.to_config(config, ROPE),
        "moe_intermediate_size": config.moe_ffn_size,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": width // config.moe_ffn_size,
        "num_experts_per_tok": config.moe_router_topk,
        "norm_topk_prob": True,
        "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
        "n_group": config.moe_router_num_groups or 1,
        "topk_group": config.moe_router_group_topk or 1,
        "first_k_dense_replace": config.num_layers - config.moe_layers,
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
    }


def from_config(found: ForeignConfig) -> ModelConfig:
    """The native configuration of a GLM-4-MoE's ``config.json``. Raises ConversionError."""
    found.require("hidden_act", ("silu", "swish"), "only silu makes a swiglu")
    found.require("norm_topk_prob", (True, None), "weights that are not normalised")
    width = found.get("moe_intermediate_size", int, 1408)
    factor = found.get("routed_scaling_factor", float, 1.0)
    dense = found.get("first_k_dense_replace", int, 1)
    count = found.get("num_hidden_layers", int)
    if found.get("num_experts_per_tok", int, 8) == 1:
        found.complaints.append(
            "num_experts_per_tok = 1: its weight would be 1 whatever the router says"
        )
    return found.model(
        **gated_decoder.options(found, positions=131072, groups=8, spelling=ROPE)
        | {"norm_epsilon": found.get("rms_norm_eps", float, 1e-5)},
        **bias_options(qkv=found.get("attention_bias", bool, False), output=False, mlp=False),
        qk_layernorm=found.get("use_qk_norm", bool, False),
        num_experts=found.get("n_routed_experts", int, 128),
        moe_router_topk=found.get("num_experts_per_tok", int, 8),
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=None if factor == 1.0 else factor,
        moe_ffn_hidden_size=width,
        moe_shared_expert_intermediate_size=width * found.get("n_shared_experts", int, 1),
        moe_layer_freq=expert_layers.layer_freq([i >= dense for i in range(count)]),
        **_groups(found),
    )


def _groups(found: ForeignConfig) -> dict[str, int]:
    groups, chosen = found.get("n_group", int, 1), found.get("topk_group", int, 1)
    k = found.get("num_experts_per_tok", int, 8)
    if groups == 1:
        return {}
    if k != RATED * chosen:
        found.complaints.append(
            f"topk_group = {chosen} with num_experts_per_tok = {k}: groups rated by their best "
            f"{RATED} experts are supported where each gives {RATED}"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _mlp(config: ModelConfig, i: int) -> list[Rule]:
    if not config.has_experts(i):
        return gated_decoder.dense_mlp(config, i)
    bias = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
    return [
        *expert_layers.experts(config, i, MLP),
        Rename(f"layers.{i}.mlp.router.expert_bias", bias),
        *expert_layers.shared_expert(i, "shared_experts"),
    ]


def weights(config: ModelConfig) -> WeightTable:
    """One line a weight, one for the same part of all experts."""
    return gated_decoder.weights(config, _mlp)


def spelling(tensors: Tensors, config: ModelConfig) -> Tensors:
    return expert_layers.unstacked(tensors, config, MLP)


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    blocks="model.layers",
    prefix="model.",
    reasons=reasons,
    to_config=to_config,
    from_config=from_config,
    weights=weights,
    spelling=spelling,
    aliases={"num_local_experts": "n_routed_experts"},
)
