"""A model's mixture-of-experts options and their rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtk.config.nearest import nearest_multiple
from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig

# Grouped matrix multiplies read rows of 16 bytes: 8 values in bf16.
UNIT = 8


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    num_experts: int | None = option(None, help="Experts of an MoE layer (default: dense).")
    moe_router_topk: int = option(2, help="Experts that each token goes to.")
    moe_ffn_hidden_size: int | None = option(
        None, help="Width of an expert (default: as ffn-hidden-size)."
    )
    moe_layer_freq: int = option(
        1, help="Every Nth layer has experts, the first among them; the others are dense."
    )
    # Not Megatron's 0, with which nothing keeps the router from using a few experts only.
    moe_aux_loss_coeff: float = option(
        0.01, help="Weight of the loss that balances experts within a sequence; 0: only measured."
    )
    moe_z_loss_coeff: float = option(
        0.0, help="Weight of the loss that keeps router logits small (1e-3 is usual)."
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
    freq = model.moe_layer_freq
    if not 1 <= freq <= max(model.num_layers, 1):
        rule = f"must lie in 1..num_layers = {model.num_layers}"
        nearest = min(max(freq, 1), max(model.num_layers, 1))
        yield Problem("moe_layer_freq", freq, rule, f"Nearest: {nearest}.")
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if not 0 <= getattr(model, name) < math.inf:
            yield Problem(name, getattr(model, name), "must be 0 or more and finite")
    factor = model.moe_expert_capacity_factor
    if factor is not None and not 0 < factor < math.inf:
        rule = "must be greater than 0 and finite"
        fix = "Nearest: 1.0 (room for an even share); leave it out to drop no token."
        yield Problem("moe_expert_capacity_factor", factor, rule, fix)
    yield from _surroundings(model)


def _without_experts(model: ModelConfig) -> Iterator[Problem]:
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name.startswith("moe_") and value != field.default:
            rule = "only means something with num_experts"
            yield Problem(field.name, value, rule, "Give --num-experts, or leave it out.")


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
