"""Mixture of experts in place of a block's MLP (Shazeer et al. 2017, Jiang et al. 2024).

A router picks K of X experts for each token (:mod:`mtk.models.router`); the token's output is
the weighted sum of theirs, and of a shared expert that all tokens go through if there is one
(Dai et al. 2024). Without a capacity no token is dropped. What crosses ranks (tokens to experts,
tokens to tensor-parallel parts, counts of a sequence's other tokens) is injected: a
:class:`Dispatcher` and a :class:`Region`.

Shape suffixes: B sequences, S a sequence's tokens, N tokens of the residual stream here, T
tokens that go through the experts here (N but under sequence parallelism), K experts a token
goes to, M = T x K assignments, X experts, E hidden size, C chunks of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.balance import BalanceLosses
from mtk.models.experts import (
    Dispatcher,
    Experts,
    LocalDispatcher,
    inverse_of,
    permute,
    spread,
)
from mtk.models.mlp import MLP
from mtk.models.router import Router, Routing, choose, probabilities
from mtk.models.sinkhorn import sinkhorn


class Region(Protocol):
    """How an MoE layer's tokens meet those of other ranks; see :class:`WholeRegion`.

    parts: ranks that each have a part of every sequence. chunks: pieces of a sequence that a
    rank has, other ranks' pieces lying between them.
    """

    parts: int
    chunks: int

    def sequence_length(self, x: Tensor) -> int:
        """Tokens of a sequence in this region, for the layer's input ``x``."""

    def chosen(self, chosen_NK: Tensor) -> Tensor:
        """[N, K] -> [T, K]: what all the region's tokens chose."""

    def own(self, x_TX: Tensor) -> Tensor:
        """[T, X] -> [N, X]: the rows of the tokens that this rank routed."""

    def loads(self, counts_CBX: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens chose each expert: of whole sequences [B, X], and of what lies before
        each chunk [C, B, X]; from the counts of the chunks."""

    def sequences(self, x_NX: Tensor, length: int) -> Tensor:
        """[N, X] -> [B, S, X]: the rows of all tokens of this region's sequences, in order.
        length: of a sequence in this region."""

    def enter(self, x_NE: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [T, E] and weights [T, K] for the experts."""

    def leave(self, out_TE: Tensor) -> Tensor:
        """The sum of the ranks' parts of each token's output, [N, E]."""


class WholeRegion:
    """One rank sees all tokens of its sequences and has whole experts."""

    parts = 1
    chunks = 1

    def sequence_length(self, x: Tensor) -> int:
        return x.shape[-2]

    def chosen(self, chosen_NK: Tensor) -> Tensor:
        return chosen_NK

    def own(self, x_TX: Tensor) -> Tensor:
        return x_TX

    def loads(self, counts_CBX: Tensor) -> tuple[Tensor, Tensor]:
        return counts_CBX[0], torch.zeros_like(counts_CBX)

    def sequences(self, x_NX: Tensor, length: int) -> Tensor:
        return x_NX.view(-1, length, x_NX.shape[1])

    def enter(self, x_NE: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        return x_NE, weights_NK

    def leave(self, out_TE: Tensor) -> Tensor:
        return out_TE


class SharedExpert(MLP):
    """An MLP of a width of its own; with a gate each token's output is weighed by a sigmoid."""

    def __init__(self, config: ModelConfig) -> None:
        width = config.moe_shared_expert_intermediate_size
        super().__init__(replace(config, ffn_hidden_size=width))
        gated = config.moe_shared_expert_gate
        self.token_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.token_gate is None else self.token_gate(x).sigmoid() * out


class MoE(nn.Module):
    """[..., S, E] -> the same shape.

    In training it attaches its balancing losses (``mtk.models.balance``), counts which experts
    are chosen and, with a capacity factor, drops assignments: an expert takes the first
    ceil(factor x K x S / X) of a sequence's tokens that chose it, by position, whatever the
    layout. A dropped assignment adds nothing. Evaluation and generation drop nothing and choose
    by scores and biases alone, so that a token's output never depends on how its prompt was cut
    or padded.
    """

    def __init__(self, config: ModelConfig, balance: BalanceLosses) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.num_experts, self.k = config.num_experts, config.moe_router_topk
        self.routing = Routing.of(config)
        self.capacity_factor = config.moe_expert_capacity_factor
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.moe_shared_expert_intermediate_size is not None
        self.shared = SharedExpert(config) if shared else None
        self.balance, self.load = balance, balance.new_layer()
        self.dispatcher: Dispatcher[Any] = LocalDispatcher()
        self.region: Region = WholeRegion()

    def forward(self, x: Tensor) -> Tensor:
        x_NE = x.flatten(0, -2)
        logits_NX = self.router(x_NE)
        weights_NK, chosen_NK = choose(logits_NX, self.routing, self._shift(x, logits_NX))
        chosen_TK = self.region.chosen(chosen_NK)
        expert_TK = chosen_TK
        if self.training:
            weights_NK, expert_TK = self._balance(x, logits_NX, weights_NK, chosen_TK)
        x_TE, weights_TK = self.region.enter(x_NE, weights_NK)
        out_TE = self._mix(x_TE, weights_TK, expert_TK)
        if self.shared is not None:
            # Before the way out: tensor-parallel parts of both are summed at once.
            out_TE = out_TE + self.shared(x_TE)
        return self.region.leave(out_TE).view_as(x)

    def _shift(self, x: Tensor, logits_NX: Tensor) -> Tensor | None:
        """What is added to scores for the choice alone."""
        if not (self.training and self.routing.assigned):
            return self.router.expert_bias
        length = self.region.sequence_length(x)
        shift_BX = sinkhorn(self.region.sequences(logits_NX.detach(), length))
        return self.region.own(shift_BX.repeat_interleave(length, dim=0))

    def _mix(self, x_TE: Tensor, weights_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts, [T, E]."""
        expert_M, order_M = expert_TK.flatten().sort(stable=True)
        inverse_M = inverse_of(order_M)
        numbers_X = torch.arange(self.num_experts, device=x_TE.device)
        counts_X = torch.searchsorted(expert_M, numbers_X, right=True).diff(
            prepend=numbers_X.new_zeros(1)
        )
        x_ME = spread(x_TE, order_M, inverse_M, self.k)
        if self.capacity_factor is not None:
            dropped_TK = expert_TK == self.num_experts
            # Zeros, so that whoever computes them meets no number out of range.
            x_ME = x_ME.masked_fill((expert_M == self.num_experts)[:, None], 0.0)
            weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
        out_ME = permute(self.compute(x_ME, counts_X), inverse_M, order_M)
        out_TKE = out_ME.view(-1, self.k, out_ME.shape[1])
        return torch.bmm(weights_TK.to(out_TKE.dtype)[:, None], out_TKE)[:, 0]

    def compute(self, x_ME: Tensor, counts_X: Tensor) -> Tensor:
        """Rows sorted by expert through their experts, wherever these are."""
        x_RE, arrival = self.dispatcher.dispatch(x_ME, counts_X)
        return self.dispatcher.combine(self.experts(x_RE, arrival.ends_X), arrival)

    def _balance(
        self, x: Tensor, logits_NX: Tensor, weights_NK: Tensor, chosen_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights with the losses tied on, and experts, X for what exceeds a capacity."""
        region = self.region
        length = region.sequence_length(x)
        whole = length * region.parts
        member_TX = torch.zeros(
            chosen_TK.shape[0], self.num_experts, dtype=torch.int32, device=x.device
        ).scatter_(1, chosen_TK, 1)
        member_BCLX = member_TX.view(-1, region.chunks, length // region.chunks, self.num_experts)
        member_CBLX = member_BCLX.transpose(0, 1)
        load_BX, before_CBX = region.loads(member_CBLX.sum(2))
        probability_NX = probabilities(logits_NX, self.routing)
        load_NX = region.own(load_BX.repeat_interleave(length, dim=0)).float()
        aux = (load_NX * probability_NX).sum() * (self.num_experts / (self.k * float(whole) ** 2))
        z = logits_NX.logsumexp(-1).square().sum()
        counts_X = member_TX.sum(0, dtype=torch.int64)
        weights_NK = self.balance.attach(weights_NK, aux, z, counts_X, self.load)
        if self.capacity_factor is None:
            return weights_NK, chosen_TK
        capacity = math.ceil(self.capacity_factor * self.k * whole / self.num_experts)
        earlier_CBLX = member_CBLX.cumsum(2) - member_CBLX + before_CBX[:, :, None]
        kept_TX = (earlier_CBLX < capacity).transpose(0, 1).flatten(0, 2)
        return weights_NK, chosen_TK.where(kept_TX.gather(1, chosen_TK), self.num_experts)
