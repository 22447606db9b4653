"""Expert parallelism: each rank has some experts, tokens travel to them and back.

Neighbours in data x context share the experts out; a rank's tokens, sorted by expert, go to
the experts' ranks in one all-to-all and return in another. Each expert may also be cut over
tensor-parallel ranks, like a dense MLP, and a shared expert is; their parts are summed in one
collective. Balancing losses, capacities and Sinkhorn's assignment go by whole sequences,
whichever ranks hold their tokens; biases of experts by the global batch.

Shape suffixes: as in ``mtk.models.moe``, and L experts of this rank, P ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.models.experts import Arrival, Experts, inverse_of, permute
from mtk.models.gpt import GPT
from mtk.models.moe import MoE, SharedExpert
from mtk.parallel.collectives import (
    all_gather,
    copy_to_parts,
    exchange,
    exchange_rows,
    gather_rows,
    scatter_sum_of_parts,
    sum_of_parts,
)
from mtk.parallel.context_balance import join
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks

Pieces = dict[str, Piece]
Compute = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExchangeArrival(Arrival):
    """How rows came. send, receive: rows to and from each rank. order, inverse: from the order
    of arrival (by rank) to that of experts, and back. given: rows handed in, dropped ones too.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    order_R: Tensor
    inverse_R: Tensor
    given: int


class ExchangeDispatcher:
    """Rows to the ranks of ``group``, which share the experts out in equal runs, and back.

    The host waits once, for the numbers of rows: no row is sent that has no expert, and none
    is padded. A rank may send or receive none at all.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(self, x_ME: Tensor, counts_X: Tensor) -> tuple[Tensor, ExchangeArrival]:
        counts_PL = counts_X.view(self.group.size, -1)
        arriving_PL = exchange(counts_X, None, None, self.group, "ep.counts").view_as(counts_PL)
        send, receive = torch.stack((counts_PL.sum(1), arriving_PL.sum(1))).tolist()
        x_RE = exchange_rows(x_ME[: sum(send)], receive, send, self.group, "ep.dispatch")
        local_L = torch.arange(counts_PL.shape[1], device=x_ME.device)
        expert_R = local_L.repeat(self.group.size).repeat_interleave(
            arriving_PL.flatten(), output_size=sum(receive)
        )
        order_R = expert_R.argsort(stable=True)
        inverse_R = inverse_of(order_R)
        arrival = ExchangeArrival(
            arriving_PL.sum(0).cumsum(0).int(),
            tuple(send),
            tuple(receive),
            order_R,
            inverse_R,
            x_ME.shape[0],
        )
        return permute(x_RE, order_R, inverse_R), arrival

    def combine(self, out_RE: Tensor, arrival: ExchangeArrival) -> Tensor:
        back_RE = permute(out_RE, arrival.inverse_R, arrival.order_R)
        out = exchange_rows(back_RE, arrival.send, arrival.receive, self.group, "ep.combine")
        return F.pad(out, (0, 0, 0, arrival.given - out.shape[0]))


class SharedRegion:
    """Tokens of tensor- and context-parallel ranks (a ``Region`` of ``mtk.models.moe``).

    sequence: tokens of a sample on this rank's tensor-parallel group, with sequence
    parallelism, where the layer's input no longer tells; else None.
    """

    def __init__(self, tp: Group, cp: Group, sequence: int | None) -> None:
        self.tp, self.cp, self.sequence = tp, cp, sequence
        self.parts = cp.size
        # Head and tail of each sequence: see context parallelism's balancing.
        self.chunks = 2 if cp.size > 1 else 1

    def sequence_length(self, x: Tensor) -> int:
        return x.shape[-2] if self.sequence is None else self.sequence

    def chosen(self, chosen_NK: Tensor) -> Tensor:
        return chosen_NK if self.sequence is None else all_gather(chosen_NK, self.tp, "moe.chosen")

    def own(self, x_TX: Tensor) -> Tensor:
        return x_TX if self.sequence is None else x_TX.chunk(self.tp.size)[self.tp.rank]

    def loads(self, counts_CBX: Tensor) -> tuple[Tensor, Tensor]:
        if self.cp.size == 1:
            return counts_CBX[0], torch.zeros_like(counts_CBX)
        gathered = all_gather(counts_CBX, self.cp, "moe.loads")
        heads, tails = gathered[0::2], gathered[1::2]
        # Rank r has chunk r and, from the other end, chunk 2 cp - 1 - r.
        ordered = torch.cat((heads, tails.flip(0)))
        before = ordered.cumsum(0) - ordered
        mine = [self.cp.rank, 2 * self.cp.size - 1 - self.cp.rank]
        return ordered.sum(0), before[mine]

    def sequences(self, x_NX: Tensor, length: int) -> Tensor:
        x_TX = x_NX if self.sequence is None else all_gather(x_NX, self.tp, "moe.rows")
        x_BSX = x_TX.view(-1, length, x_TX.shape[1])
        return join(x_BSX, self.cp, "moe.sequences")

    def enter(self, x_NE: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        # Each rank's output is a part of the sum, so weights too get a part of their gradient.
        if self.sequence is None:
            x_TE = copy_to_parts(x_NE, self.tp, "moe.tokens")
            return x_TE, copy_to_parts(weights_NK, self.tp, "moe.weights")
        x_TE = gather_rows(x_NE, self.tp, "moe.tokens")
        return x_TE, gather_rows(weights_NK, self.tp, "moe.weights")

    def leave(self, out_TE: Tensor) -> Tensor:
        if self.sequence is None:
            return sum_of_parts(out_TE, self.tp, "moe.output")
        return scatter_sum_of_parts(out_TE, self.tp, "moe.output")


def shard_experts(model: GPT, ranks: Ranks, sequence_parallel: bool, pieces: Pieces) -> None:
    """Cut the experts of ``model`` (best on the meta device) over ``ranks.ep`` and ``ranks.tp``
    and hook in what crosses ranks; after :func:`mtk.parallel.tensor.shard_tensors`.

    pieces: updated to what this rank holds. Sizes must divide (the configuration's rules).
    Nothing is done for a dense model.
    """
    sequence = model.config.seq_length // ranks.cp.size if sequence_parallel else None
    for index, block in model.layers.items():
        layer = block.mlp
        if not isinstance(layer, MoE):
            continue
        name = f"layers.{index}.mlp"
        _cut(layer.experts, f"{name}.experts", ranks, pieces)
        if layer.shared is not None:
            _cut_shared(layer.shared, f"{name}.shared", ranks.tp, pieces)
        if sequence_parallel:
            pieces[f"{name}.router.weight"] = _of_rows(pieces[f"{name}.router.weight"], ranks.tp)
        layer.region = SharedRegion(ranks.tp, ranks.cp, sequence)
        if ranks.ep.size > 1:
            layer.dispatcher = ExchangeDispatcher(ranks.ep)
            # Compiled, it would be compiled again for each number of rows that arrives.
            compute = _uncompiled(layer.compute)
            layer.compute = compute  # type: ignore[method-assign, assignment]
    if model.balance is not None:
        model.balance.holders = 1 if sequence_parallel else ranks.tp.size


def _cut(experts: Experts, name: str, ranks: Ranks, pieces: Pieces) -> None:
    """Experts over ``ep``, the width of each over ``tp``."""
    for part, dim in (("gate", 1), ("up", 1), ("down", 2)):
        parameter = getattr(experts, part)
        if parameter is None:
            continue
        piece = expert_piece(pieces[f"{name}.{part}"], dim, ranks)
        pieces[f"{name}.{part}"] = piece
        local = piece.cut(parameter.detach()).clone(memory_format=torch.contiguous_format)
        setattr(experts, part, nn.Parameter(local, requires_grad=parameter.requires_grad))


def _cut_shared(shared: SharedExpert, name: str, tp: Group, pieces: Pieces) -> None:
    """Its width over ``tp``; the gate of tokens sees all of them, but a part of each output."""
    for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
        linear = getattr(shared, part)
        if linear is None:
            continue
        piece = replace(pieces[f"{name}.{part}.weight"], partial=()).sharded(dim, tp)
        pieces[f"{name}.{part}.weight"] = piece
        local = piece.cut(linear.weight.detach()).clone(memory_format=torch.contiguous_format)
        linear.weight = nn.Parameter(local, requires_grad=linear.weight.requires_grad)
    if shared.token_gate is not None:
        gate = f"{name}.token_gate.weight"
        pieces[gate] = _of_rows(pieces[gate], tp)


def expert_piece(whole: Piece, dim: int, ranks: Ranks) -> Piece:
    """This rank's part of a whole [X, ...] parameter that is cut along ``dim`` too; the ranks
    of ``expert_shards`` hold copies of it."""
    copies = tuple(group for group in whole.copies if group.name != ranks.shards.name)
    piece = replace(whole, copies=copies, partial=()).with_copies(ranks.expert_shards)
    return piece.sharded(0, ranks.ep).sharded(dim, ranks.tp)


def _uncompiled(function: Compute) -> Compute:
    out: Compute = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return out


def _of_rows(piece: Piece, tp: Group) -> Piece:
    """What sees the rank's own rows, or parts of outputs, only has a part of its gradient."""
    known = any(group.name == tp.name for group in piece.partial)
    return piece if known else piece.with_partial(tp)
