"""A model's mixture-of-experts options and their rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.config.layer_pattern import nearest_pattern, pattern_problem
from mtk.config.nearest import divisors, nearest, nearest_multiple
from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig

# Grouped matrix multiplies read rows of 16 bytes: 8 values in bf16.
UNIT = 8
AUX_LOSS_COEFF = 0.01


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    num_experts: int | None = option(None, help="Experts of an MoE layer (default: dense).")
    moe_router_topk: int = option(2, help="Experts that each token goes to.")
    moe_ffn_hidden_size: int | None = option(
        None, help="Width of an expert (default: as ffn-hidden-size)."
    )
    moe_layer_freq: str = option(
        "1",
        help="Every Nth layer has experts, the first among them; or a list of 1 (experts) and 0 "
        "(dense) for all layers, as in '[0]*3+[1]*58'.",
    )
    moe_shared_expert_intermediate_size: int | None = option(
        None, help="Width of an MLP beside the experts that all tokens go through (default: none)."
    )
    moe_shared_expert_gate: bool = option(
        False, help="Weigh the shared expert by a sigmoid of each token, as Qwen2-MoE does."
    )
    moe_router_score_function: Literal["softmax", "sigmoid"] = option(
        "softmax", help="What makes logits of experts into weights; sigmoid is DeepSeek-V3's."
    )
    moe_router_pre_softmax: bool = option(
        False,
        help="Softmax over all experts and not over the chosen ones, whose weights then add up "
        "to less than one.",
    )
    moe_router_topk_scaling_factor: float | None = option(
        None, help="Multiplies the weights of the chosen experts (default: 1)."
    )
    moe_router_num_groups: int | None = option(
        None, help="Groups of neighbouring experts to choose among first (default: no groups)."
    )
    moe_router_group_topk: int | None = option(
        None, help="Groups that a token's experts may come from; needs moe-router-num-groups."
    )
    moe_router_load_balancing_type: Literal["seq_aux_loss", "sinkhorn", "none"] = option(
        "seq_aux_loss",
        help="What balances experts within each sequence: a loss; or, in training, an even "
        "assignment by Sinkhorn's algorithm. Neither depends on micro-batches or ranks.",
    )
    # Not Megatron's 0, with which nothing keeps the router from using a few experts only.
    moe_aux_loss_coeff: float | None = option(
        None,
        help=f"Weight of seq_aux_loss; 0: only measured (default: {AUX_LOSS_COEFF}, with other "
        "load balancing 0).",
    )
    moe_z_loss_coeff: float = option(
        0.0, help="Weight of the loss that keeps router logits small (1e-3 is usual)."
    )
    moe_router_enable_expert_bias: bool = option(
        False,
        help="Balance experts over the global batch without a loss: a bias for each, moved after "
        "every step, takes part in the choice and not in weights. Needs sigmoid.",
    )
    moe_router_bias_update_rate: float = option(
        1e-3, help="By how much a step moves the biases of experts."
    )
    moe_expert_capacity_factor: float | None = option(
        None,
        help="In training an expert takes at most this times its even share of a sequence's "
        "tokens, the first ones (default: all of them).",
    )


def moe_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of the model's own MoE options."""
    if model.num_experts is None:
        yield from _without_experts(model)
        return
    experts, k = model.num_experts, model.moe_router_topk
    if experts < 2:
        yield Problem("num_experts", experts, "must be at least 2", "Nearest: 2, or leave it out.")
    elif not 1 <= k <= experts:
        rule = f"must lie in 1..num_experts = {experts}"
        yield Problem("moe_router_topk", k, rule, f"Nearest: {min(max(k, 1), experts)}.")
    else:
        yield from _groups(model, experts, k)
    rule = pattern_problem(model.moe_layer_freq, model.num_layers)
    if rule:
        given = model.moe_layer_freq
        number = int(given) if given.lstrip("+-").isdigit() else given
        fix = nearest_pattern(given, model.num_layers)
        yield Problem("moe_layer_freq", number, rule, fix)
    yield from _weights(model)
    yield from _balance(model)
    yield from _shared_expert(model)
    yield from _surroundings(model)


def _without_experts(model: ModelConfig) -> Iterator[Problem]:
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name.startswith("moe_") and value != field.default:
            rule = "only means something with num_experts"
            yield Problem(field.name, value, rule, "Give --num-experts, or leave it out.")


def _groups(model: ModelConfig, experts: int, k: int) -> Iterator[Problem]:
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if groups is None or chosen is None:
        for name, other in (
            ("moe_router_num_groups", "moe_router_group_topk"),
            ("moe_router_group_topk", "moe_router_num_groups"),
        ):
            value = getattr(model, name)
            if value is not None and getattr(model, other) is None:
                fix = f"Give --{other.replace('_', '-')} too, or leave it out."
                yield Problem(name, value, f"only means something with {other}", fix)
        return
    if groups < 1 or experts % groups:
        rule = f"must divide num_experts = {experts}"
        yield Problem("moe_router_num_groups", groups, rule, nearest(groups, divisors(experts)))
        return
    # Each chosen group is rated by its best k / group_topk experts, and must have as many.
    legal = [n for n in divisors(k) if n <= groups and k // n <= experts // groups]
    if chosen not in legal:
        rule = f"must divide moe_router_topk = {k}, be at most moe_router_num_groups = {groups}, "
        rule += f"and such groups of {experts // groups} experts must hold the {k}"
        yield Problem("moe_router_group_topk", chosen, rule, nearest(chosen, legal))
    if model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax:
        rule = "rates groups by scores, which a softmax over the chosen experts has not yet"
        fix = "Add --moe-router-pre-softmax, or --moe-router-score-function sigmoid."
        yield Problem("moe_router_num_groups", groups, rule, fix)


def _weights(model: ModelConfig) -> Iterator[Problem]:
    if model.moe_router_pre_softmax and model.moe_router_score_function != "softmax":
        rule = "only means something with moe_router_score_function = softmax"
        yield Problem("moe_router_pre_softmax", True, rule, "Leave it out.")
    factor = model.moe_router_topk_scaling_factor
    if factor is not None and not 0 < factor < math.inf:
        rule = "must be greater than 0 and finite"
        yield Problem("moe_router_topk_scaling_factor", factor, rule, "Nearest: 1.0.")
    factor = model.moe_expert_capacity_factor
    if factor is not None and not 0 < factor < math.inf:
        rule = "must be greater than 0 and finite"
        fix = "Nearest: 1.0 (room for an even share); leave it out to drop no token."
        yield Problem("moe_expert_capacity_factor", factor, rule, fix)


def _balance(model: ModelConfig) -> Iterator[Problem]:
    kind, coefficient = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        value = getattr(model, name)
        if value is not None and not 0 <= value < math.inf:
            yield Problem(name, value, "must be 0 or more and finite")
    if coefficient and kind != "seq_aux_loss":
        rule = f"has no loss to weigh with moe_router_load_balancing_type = {kind}"
        yield Problem("moe_aux_loss_coeff", coefficient, rule, "Nearest: 0, or seq_aux_loss.")
    if kind == "sinkhorn" and model.moe_router_num_groups is not None:
        rule = "assigns tokens among all experts, not in groups"
        fix = "Leave out --moe-router-num-groups, or use seq_aux_loss."
        yield Problem("moe_router_load_balancing_type", kind, rule, fix)
    rate = model.moe_router_bias_update_rate
    if not 0 <= rate < math.inf:
        yield Problem("moe_router_bias_update_rate", rate, "must be 0 or more and finite")
    if not model.moe_router_enable_expert_bias:
        if rate != MoeOptions.moe_router_bias_update_rate:
            rule = "only means something with moe_router_enable_expert_bias"
            fix = "Add --moe-router-enable-expert-bias, or leave it out."
            yield Problem("moe_router_bias_update_rate", rate, rule, fix)
        return
    if model.moe_router_score_function != "sigmoid":
        rule = "is added to scores between 0 and 1 that do not depend on other experts"
        fix = "Add --moe-router-score-function sigmoid."
        yield Problem("moe_router_enable_expert_bias", True, rule, fix)
    if kind == "sinkhorn":
        rule = "and sinkhorn both decide which experts are chosen"
        fix = "Use --moe-router-load-balancing-type none or seq_aux_loss."
        yield Problem("moe_router_enable_expert_bias", True, rule, fix)


def _shared_expert(model: ModelConfig) -> Iterator[Problem]:
    width = model.moe_shared_expert_intermediate_size
    if width is not None and width < 1:
        yield Problem("moe_shared_expert_intermediate_size", width, "must be at least 1")
    if width is None and model.moe_shared_expert_gate:
        rule = "only means something with moe_shared_expert_intermediate_size"
        yield Problem("moe_shared_expert_gate", True, rule, "Give that width, or leave it out.")


def _surroundings(model: ModelConfig) -> Iterator[Problem]:
    """What the rest of the model must be for its experts to fit in."""
    if model.family != "gpt":
        rule = f"family {model.family} has no experts here"
        yield Problem("num_experts", model.num_experts, rule, "Use --family gpt, or leave it out.")
    if model.add_bias_linear:
        rule = "experts have no biases (they are one grouped matrix multiply)"
        fix = "Add --disable-bias-linear; --add-qkv-bias keeps those of the attention."
        yield Problem("add_bias_linear", True, rule, fix)
    for name, width in (
        ("hidden_size", model.hidden_size),
        ("moe_ffn_hidden_size", model.moe_ffn_size),
    ):
        if width < 1 or width % UNIT:
            rule = f"must be a multiple of {UNIT} in a model with experts"
            yield Problem(name, width, rule, f"Nearest: {nearest_multiple(width, UNIT)}.")
