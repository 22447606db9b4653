"""Mamba-2 layers over ranks: heads over tensor-parallel ones, and over context-parallel ones.

Tensor parallelism cuts every part of the projection and of the convolution by heads or by
groups; where there are fewer groups than ranks, B and C are copied and the norm of a group
sums its squares over the ranks that share it. Context parallelism exchanges tokens for heads
(DeepSpeed-Ulysses; Jacobs et al. 2023): a state depends on all earlier tokens of its sequence,
but on those of its own head only.

Shape suffixes: B batch, S local tokens, T all tokens, I channels of all heads, G groups, N
state, C any channels, W tokens that a convolution looks at.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.models.mamba import Mamba, Stream, Weights
from mtk.parallel import collectives
from mtk.parallel.collectives import copy_to_parts, sum_of_parts
from mtk.parallel.context_balance import by_rank, in_order
from mtk.parallel.context_gather import all_documents
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks
from mtk.parallel.tensor import Cutter, Region, RowParallelLinear, entering


def shard_mamba(
    model: GPT, ranks: Ranks, sequence_parallel: bool, pieces: dict[str, Piece]
) -> None:
    """Cut the Mamba layers of ``model`` (best on the meta device) and hook in what crosses
    ranks; before :func:`mtk.parallel.tensor.shard_tensors`, which looks at what is left whole.

    pieces: updated to what this rank holds. Sizes must divide (the configuration's rules).
    """
    sequence = model.config.seq_length // ranks.cp.size
    region = Region(ranks.tp, sequence if sequence_parallel else None)
    cutter = Cutter(ranks, pieces)
    for index, block in model.layers.items():
        layer = getattr(block, "mamba", None)
        if not isinstance(layer, Mamba):
            continue
        if ranks.tp.size > 1:
            _cut(layer, f"layers.{index}.mamba", region, cutter, ranks.states)
        if ranks.cp.size > 1:
            layer.exchange = HeadExchange(ranks.cp, layer.head_dim, layer.state_dim)


def _cut(layer: Mamba, name: str, region: Region, cutter: Cutter, sharing: Group) -> None:
    layer.register_forward_pre_hook(entering(region, "tp.mamba"))
    for part in ("gate", "input", "dt", "conv_input"):
        cutter.rows(getattr(layer, part), f"{name}.{part}")
    for part in ("b", "c", "conv_b", "conv_c"):
        cutter.shared_rows(getattr(layer, part), f"{name}.{part}", layer.state_dim, sharing)
    for scalars in ("dt_bias", "a_log", "skip"):
        cutter.cut(layer, scalars, 0, f"{name}.{scalars}")
    cutter.cut(layer.norm, "weight", 0, f"{name}.norm.weight")
    if sharing.size > 1:
        layer.norm.whole = partial(_over_parts, group=sharing)
    cutter.cut(layer.output, "weight", 1, f"{name}.output.weight")
    layer.output = RowParallelLinear(layer.output, region, "tp.mamba.output")


def _over_parts(squares: Tensor, group: Group) -> Tensor:
    """Sums of all ranks of ``group``. Each goes on with its own part of the channels, so that
    gradients are summed too."""
    whole = sum_of_parts(squares, group, "tp.mamba.norm")
    return copy_to_parts(whole, group, "tp.mamba.norm.backward")


class HeadExchange:
    """From all heads of some tokens to all tokens of some heads, and back (an ``Exchange`` of
    ``mtk.models.mamba``). head, state: channels of a head and of its state.

    The parameters of a rank's heads are slices of what it holds; the sum over data x context
    ranks, which all gradients go through, puts the parts together.
    """

    def __init__(self, group: Group, head: int, state: int) -> None:
        self.group, self.head, self.state = group, head, state

    def enter(self, stream: Stream, weights: Weights) -> tuple[Stream, Weights]:
        repeats = self._repeats(stream.b.shape[-1])
        shared = [self._repeated(x, repeats, -1) for x in (stream.b, stream.c)]
        whole = (stream.x, *shared, stream.dt)
        parts = [torch.unflatten(x, -1, (self.group.size, -1)) for x in whole]
        # One message to each rank: all that it mixes.
        rows = torch.cat(parts, dim=-1).movedim(2, 0).contiguous()
        rows = collectives.exchange_rows(rows, None, None, self.group, "cp.mamba")
        mixed_BTC = in_order(rows.movedim(0, 1).flatten(1, 2), self.group.size, 1)
        x, b, c, dt = torch.split(mixed_BTC, [part.shape[-1] for part in parts], dim=-1)
        documents = stream.documents
        if documents is not None:
            documents = all_documents(documents, self.group)
        return Stream(x, b, c, dt, documents), self._own(weights, repeats)

    def leave(self, y_BTC: Tensor) -> Tensor:
        """[B, T, own channels] -> [B, S, I]."""
        rows = torch.unflatten(by_rank(y_BTC, self.group.size, 1), 1, (self.group.size, -1))
        rows = rows.movedim(1, 0).contiguous()
        rows = collectives.exchange_rows(rows, None, None, self.group, "cp.mamba.out")
        return rows.movedim(0, 2).flatten(2, 3)

    def _own(self, weights: Weights, repeats: int) -> Weights:
        x, b, c = weights.x, weights.b, weights.c
        return Weights(
            (self._part(x[0]), None if x[1] is None else self._part(x[1])),
            self._own_group(b, repeats),
            self._own_group(c, repeats),
            self._part(weights.dt_bias),
            self._part(weights.a_log),
            self._part(weights.skip),
        )

    def _own_group(
        self, convolution: tuple[Tensor, Tensor | None], repeats: int
    ) -> tuple[Tensor, Tensor | None]:
        weight, bias = convolution
        own = None if bias is None else self._part(self._repeated(bias, repeats, 0))
        return self._part(self._repeated(weight, repeats, 0)), own

    def _repeats(self, channels: int) -> int:
        """How often each group is sent where there are fewer of them than ranks."""
        groups = channels // self.state
        return math.lcm(groups, self.group.size) // groups

    def _repeated(self, x: Tensor, repeats: int, dim: int) -> Tensor:
        """Each group of channels ``repeats`` times, one behind the other."""
        if repeats == 1:
            return x
        groups = torch.unflatten(x, dim, (-1, self.state))
        at = dim - 1 if dim < 0 else dim
        return groups.repeat_interleave(repeats, dim=at).flatten(at, at + 1)

    def _part(self, x: Tensor) -> Tensor:
        return x.chunk(self.group.size)[self.group.rank]
