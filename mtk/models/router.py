"""Routers: which experts a token goes to, and with what weights.

Softmax over the chosen logits (Jiang et al. 2024), over all (Fedus et al. 2022, Qwen-MoE
without normalisation), or sigmoids normalised over the chosen ones (DeepSeek-V3 2024). Groups
limit a token's experts to the best few groups (DeepSeek-V3, section 2.1.2). What is added to
scores to balance experts takes part in the choice alone, never in the weights: the biases of
Wang et al. 2024 ("Auxiliary-loss-free load balancing"), or the potentials of
:mod:`mtk.models.sinkhorn`.

Shape suffixes: N tokens, K experts a token goes to, X experts, G groups, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig


class Router(nn.Module):
    """Logits of each expert, in fp32 whatever the model computes in.

    expert_bias: fp32 [X], kept in checkpoints but moved by no gradient; None without.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        biased = config.moe_router_enable_expert_bias
        self.register_buffer(
            "expert_bias",
            torch.zeros(config.num_experts, dtype=torch.float32) if biased else None,
        )

    def forward(self, x_NE: Tensor) -> Tensor:
        return F.linear(x_NE.float(), self.weight.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Biases stay fp32 when the model is cast: rounded they would choose other experts."""
        exact = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.expert_bias
        if exact is not None and moved is not None and moved.dtype != torch.float32:
            self.expert_bias = exact.to(moved.device)
        return self


@dataclass(frozen=True)
class Routing:
    """How logits become a choice and weights; see :class:`mtk.config.moe.MoeOptions`.

    assigned: in training by Sinkhorn's potentials, which are those of logits.
    """

    k: int
    sigmoid: bool = False
    over_all: bool = False
    factor: float | None = None
    groups: int | None = None
    chosen_groups: int | None = None
    assigned: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> Routing:
        return cls(
            k=config.moe_router_topk,
            sigmoid=config.moe_router_score_function == "sigmoid",
            # Over one chosen expert a softmax would not depend on the router.
            over_all=config.moe_router_pre_softmax or config.moe_router_topk == 1,
            factor=config.moe_router_topk_scaling_factor,
            groups=config.moe_router_num_groups,
            chosen_groups=config.moe_router_group_topk,
            assigned=config.moe_router_load_balancing_type == "sinkhorn",
        )


def choose(logits_NX: Tensor, how: Routing, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights (fp32) and numbers (int64) of each token's experts, both [N, K].

    shift: [X] or [N, X], added to what is compared (sigmoids, but ``assigned`` and with softmax
    logits).
    """
    with torch.no_grad():
        chosen_NK = _compared(logits_NX, how, shift).topk(how.k, dim=-1).indices
    return _weights(logits_NX, chosen_NK, how), chosen_NK


def _compared(logits_NX: Tensor, how: Routing, shift: Tensor | None) -> Tensor:
    """What the choice goes by. Logits where nothing is added to scores: they grow alike."""
    biased = shift is not None and not how.assigned
    scored = how.groups is not None or (how.sigmoid and biased)
    compared_NX = logits_NX
    if scored:
        compared_NX = logits_NX.sigmoid() if how.sigmoid else logits_NX.softmax(-1)
    if shift is not None:
        compared_NX = compared_NX + shift
    return compared_NX if how.groups is None else _within_best_groups(compared_NX, how)


def _within_best_groups(compared_NX: Tensor, how: Routing) -> Tensor:
    """-inf for all experts but those of the groups whose best k / groups add up to most."""
    assert how.groups is not None and how.chosen_groups is not None
    grouped_NGx = compared_NX.view(compared_NX.shape[0], how.groups, -1)
    rating_NG = grouped_NGx.topk(how.k // how.chosen_groups, dim=-1).values.sum(-1)
    best = rating_NG.topk(how.chosen_groups, dim=-1).indices
    other_NG = torch.ones_like(rating_NG, dtype=torch.bool).scatter(-1, best, False)
    return grouped_NGx.masked_fill(other_NG[..., None], float("-inf")).view_as(compared_NX)


def _weights(logits_NX: Tensor, chosen_NK: Tensor, how: Routing) -> Tensor:
    if how.sigmoid:
        # Sigmoids over their sum; as a softmax of their logarithms it has no 0 / 0.
        best_NK = logits_NX.gather(-1, chosen_NK)
        weights_NK = best_NK.sigmoid() if how.k == 1 else F.logsigmoid(best_NK).softmax(-1)
    elif how.over_all:
        weights_NK = logits_NX.softmax(-1).gather(-1, chosen_NK)
    else:
        weights_NK = logits_NX.gather(-1, chosen_NK).softmax(-1)
    return weights_NK if how.factor is None else weights_NK * how.factor


def probabilities(logits_NX: Tensor, how: Routing) -> Tensor:
    """Scores of all experts as shares of one, for the balancing loss. Sigmoids that are all
    next to nothing add up to one too: no loss can be lowered by making them vanish."""
    return (F.logsigmoid(logits_NX) if how.sigmoid else logits_NX).softmax(-1)
