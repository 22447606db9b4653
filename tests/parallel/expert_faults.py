"""Seeded faults of expert parallelism: each changes one thing on the ranks that run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtk.models.balance import BalanceLosses
from mtk.models.experts import permute
from mtk.models.gpt import GPT
from mtk.parallel import apply, collectives, expert, tensor
from mtk.parallel.expert import ExchangeDispatcher, SharedRegion
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks

TP, EP, SP = "tensor_model_parallel_size", "expert_model_parallel_size", "sequence_parallel"


def _set(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


def _without_site(site: str, otherwise: Callable[[Tensor], Tensor]) -> None:
    """Leave one call site's collective out."""
    for name in ("copy_to_parts", "sum_of_parts", "gather_rows", "scatter_sum_of_parts"):
        original = getattr(expert, name)

        def replaced(x: Tensor, group: Any, at: str, original: Any = original) -> Tensor:
            return otherwise(x) if at == site else original(x, group, at)

        _set(expert, name, replaced)


def _exchange(site: str, change: Callable[[Tensor], Tensor]) -> None:
    original = expert.exchange_rows

    def replaced(x: Tensor, receive: Any, send: Any, group: Any, at: str) -> Tensor:
        out = original(x, receive, send, group, at)
        return change(out) if at == site else out

    _set(expert, "exchange_rows", replaced)


def _begin(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    original = BalanceLosses.begin

    def begin(self: BalanceLosses, device: torch.device, **given: Any) -> None:
        original(self, device, **change(given))

    _set(BalanceLosses, "begin", begin)


def _not_sent_back() -> None:
    def combine(self: ExchangeDispatcher, out_RE: Tensor, arrival: Any) -> Tensor:
        rows = out_RE[: arrival.given]
        return torch.nn.functional.pad(rows, (0, 0, 0, arrival.given - rows.shape[0]))

    _set(ExchangeDispatcher, "combine", combine)


def _order_of_arrival() -> None:
    def kept(x_ME: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        return permute(x_ME, order_M.sort().values, inverse_M.sort().values)

    _set(expert, "permute", kept)


def _own_tokens_chosen() -> None:
    def chosen(self: SharedRegion, chosen_NK: Tensor) -> Tensor:
        return chosen_NK.repeat(self.tp.size if self.sequence else 1, 1)

    _set(SharedRegion, "chosen", chosen)


def _all_reduce_twice(site: str) -> None:
    original = collectives.all_reduce

    def twice(x: Tensor, group: Any, at: str, op: str = "sum") -> Tensor:
        out = original(x, group, at, op)
        return original(out, group, at, op) if at == site else out

    _set(collectives, "all_reduce", twice)


def _router_whole() -> None:
    _set(expert, "_of_rows", lambda piece, tp: piece)
    _set(tensor, "_sum_gradients_of_rows", _all_but_routers)


_sum_of_rows = tensor._sum_gradients_of_rows


def _all_but_routers(model: GPT, tp: Any, pieces: dict[str, Piece]) -> None:
    before = {name: piece for name, piece in pieces.items() if "router" in name}
    _sum_of_rows(model, tp, pieces)
    pieces.update(before)


def _experts_summed_over_all() -> None:
    original = expert.expert_piece

    def piece(whole: Piece, dim: int, ranks: Ranks) -> Piece:
        return original(whole, dim, ranks).with_partial(ranks.ep)

    _set(expert, "expert_piece", piece)


def _same_holders() -> None:
    original = expert.shard_experts

    def shard(model: GPT, *rest: Any) -> None:
        original(model, *rest)
        assert model.balance is not None
        model.balance.holders = 1

    _set(apply, "shard_experts", shard)


DENSE_TP, WITH_SP = {TP: 2, EP: 2}, {TP: 2, EP: 2, SP: True}
FAULTS: dict[str, tuple[dict[str, Any], Callable[[], None]]] = {
    "outputs not sent back": ({EP: 2}, _not_sent_back),
    "outputs sent back twice over": ({EP: 2}, lambda: _exchange("ep.combine", lambda x: 2 * x)),
    "outputs in the wrong order": ({EP: 2}, lambda: _exchange("ep.combine", lambda x: x.flip(0))),
    "tokens in the wrong order": (
        {EP: 2},
        lambda: _exchange("ep.dispatch", lambda x: x.roll(1, 0)),
    ),
    "experts get tokens by rank": ({EP: 2}, _order_of_arrival),
    "aux loss scaled by ep": (
        {EP: 2},
        lambda: _begin(lambda g: g | {"samples": g["samples"] // 2}),
    ),
    "z-loss per rank": ({EP: 2}, lambda: _begin(lambda g: g | {"tokens": g["tokens"] // 2})),
    "loss scale forgotten": ({EP: 2}, lambda: _begin(lambda g: g | {"loss_scale": 2.0})),
    "expert gradients over ep": ({EP: 2}, _experts_summed_over_all),
    "outputs of parts not summed": (
        DENSE_TP,
        lambda: _without_site("moe.output", lambda x: x),
    ),
    "token gradients of parts not summed": (
        DENSE_TP,
        lambda: _without_site("moe.tokens", lambda x: x),
    ),
    "weight gradients of parts not summed": (
        DENSE_TP,
        lambda: _without_site("moe.weights", lambda x: x),
    ),
    "token gradients summed twice": (DENSE_TP, lambda: _all_reduce_twice("moe.tokens")),
    "balance counted by each part": (DENSE_TP, _same_holders),
    "weights of own rows only": (
        WITH_SP,
        lambda: _without_site("moe.weights", lambda x: x.repeat(2, 1)),
    ),
    "choices of own rows only": (WITH_SP, _own_tokens_chosen),
    "router gradient of own rows only": (WITH_SP, _router_whole),
}
