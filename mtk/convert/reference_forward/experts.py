"""Mixtures of experts: the choice a token at a time, then one expert after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.reference_forward.plain import Weights, activation, affine

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe")
CHOSEN = {"mixtral": 2, "qwen2_moe": 4, "qwen3_moe": 8, "glm4_moe": 8}


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    kind = str(config["model_type"])
    if kind not in KINDS:
        return False
    if kind == "glm4_moe":
        return layer >= int(config.get("first_k_dense_replace", 1))
    if kind == "mixtral":
        return True
    dense = config.get("mlp_only_layers") or []
    return layer not in dense and (layer + 1) % int(config.get("decoder_sparse_step", 1)) == 0


def mixture(config: Mapping[str, Any], w: Weights, layer: int, x_BSE: Tensor) -> Tensor:
    """What the MoE layer number ``layer`` adds, [B, S, E]."""
    kind = str(config["model_type"])
    mixtral = kind == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    m = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}"
    act = activation(str(config.get("hidden_act", "silu")))

    def mlp(x: Tensor, name: str, parts: tuple[str, ...]) -> Tensor:
        gate, up = (affine(x, w, f"{name}.{part}", bias=False) for part in parts[:2])
        return affine(act(gate) * up, w, f"{name}.{parts[2]}", bias=False)

    x_TE = x_BSE.flatten(0, 1)
    logits = x_TE.float() @ w[f"{m}.gate.weight"].float().T
    bias = w.get(f"{m}.gate.e_score_correction_bias", torch.zeros(1)).float()
    weights = [_chosen(config, row, bias) for row in logits]
    out_TE = torch.zeros_like(x_TE)
    for expert in range(logits.shape[1]):
        tokens = [t for t, chosen in enumerate(weights) if expert in chosen]
        weight = torch.tensor([[weights[t][expert]] for t in tokens]).view(-1, 1)
        out_TE[tokens] += weight * mlp(x_TE[tokens], f"{m}.experts.{expert}", names)
    out_BSE = out_TE.view_as(x_BSE)
    if kind == "qwen2_moe":
        gate = torch.sigmoid(affine(x_BSE, w, f"{m}.shared_expert_gate", bias=False))
        out_BSE = out_BSE + gate * mlp(x_BSE, f"{m}.shared_expert", names)
    if kind == "glm4_moe":
        out_BSE = out_BSE + mlp(x_BSE, f"{m}.shared_experts", names)
    return out_BSE


def _chosen(config: Mapping[str, Any], logits: Tensor, bias: Tensor) -> dict[int, float]:
    """Numbers and weights of one token's experts."""
    kind = str(config["model_type"])
    count = int(config.get("num_experts_per_tok", CHOSEN[kind]))
    if kind == "glm4_moe":
        scores = torch.sigmoid(logits)
        rating = (scores + bias).tolist()
        allowed = _best_groups(config, rating)
        normalised, factor = True, float(config.get("routed_scaling_factor", 1.0))
    else:
        scores = torch.softmax(logits, dim=0)
        rating, allowed = scores.tolist(), list(range(len(logits)))
        normalised, factor = kind == "mixtral" or bool(config.get("norm_topk_prob")), 1.0
    best = sorted(allowed, key=lambda expert: -rating[expert])[:count]
    total = sum(float(scores[expert]) for expert in best) if normalised else 1.0
    return {expert: factor * float(scores[expert]) / total for expert in best}


def _best_groups(config: Mapping[str, Any], rating: list[float]) -> list[int]:
    """Experts of the groups whose two best ones add up to most."""
    groups, kept = int(config.get("n_group", 1)), int(config.get("topk_group", 1))
    size = len(rating) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    members.sort(key=lambda group: -sum(sorted((rating[e] for e in group), reverse=True)[:2]))
    return [expert for group in members[:kept] for expert in group]
