"""Seeded faults in context parallelism: the comparison with whole sequences catches each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mtk.parallel import (
    collectives,
    context_chunks,
    context_exchange,
    context_gather,
    context_ring,
)
from mtk.parallel.collectives import InFlight
from mtk.parallel.context import context_kernel
from mtk.parallel.context_chunks import Block, Documents, MathChunks
from mtk.parallel.groups import Group
from tests.parallel.attention_cases import errors, make_case, on_ranks, whole
from tests.parallel.ranks import run_ranks
from tests.parallel.test_context import GRADIENTS, OUTPUT, context_group

CP = 3
WHOLE = slice(None)


def last_wins(lse: Tensor, other: Tensor) -> Tensor:
    """Merging without rescaling what was there."""
    return torch.ones_like(lse)


def averaged(lse: Tensor, other: Tensor) -> Tensor:
    """Merging as if all blocks had the same weight."""
    return torch.full_like(lse, 0.5)


def ring_of(change: Callable[[int, int, int], Block | None]) -> Callable[[int, int, int], Block]:
    """A rule of the ring that is wrong where ``change`` gives a block."""
    right = context_ring.ring_block
    return lambda rank, source, length: change(rank, source, length) or right(rank, source, length)


def own_block_full(rank: int, source: int, length: int) -> Block | None:
    return Block(WHOLE, WHOLE, causal=False) if rank == source else None


def tail_of_earlier(rank: int, source: int, length: int) -> Block | None:
    return Block(WHOLE, slice(length // 2, length), causal=False) if source < rank else None


def all_of_earlier(rank: int, source: int, length: int) -> Block | None:
    return Block(WHOLE, WHOLE, causal=False) if source < rank else None


def head_sees_later(rank: int, source: int, length: int) -> Block | None:
    return Block(slice(0, length // 2), WHOLE, causal=False) if source > rank else None


def without_earlier_keys(rank: int, cp: int, length: int) -> list[list[Block]]:
    return [blocks[:1] for blocks in RIGHT_GATHER(rank, cp, length)]


def all_causal_full(rank: int, cp: int, length: int) -> list[list[Block]]:
    return [[replace(b, causal=False) for b in each] for each in RIGHT_GATHER(rank, cp, length)]


def contiguous_chunks(x: Tensor, cp: int, dim: int) -> Tensor:
    """As if the parts were cut without balancing: local order for the causal rule."""
    return x


def forgetful_scores(
    q: Tensor, k: Tensor, rows: slice, causal: bool, documents: Documents | None
) -> Tensor:
    return RIGHT_SCORES(q, k, rows, causal, None)


def without_documents(self: Block, documents: Documents | None) -> Documents | None:
    """A block that takes the first documents, whichever its queries and keys are."""
    own = RIGHT_DOCUMENTS(self, documents)
    if documents is None or own is None:
        return None
    return documents[0][:, : own[0].shape[1]], documents[1][:, : own[1].shape[1]]


def stays(site: str) -> Callable[..., InFlight]:
    """A shift that hands back what it was given, at one call site."""

    def shift(tensors: Sequence[Tensor], group: Group, at: str, step: int = 1) -> InFlight:
        return InFlight(tensors) if at == site else RIGHT_SHIFT(tensors, group, at, step)

    return shift


def other_way(tensors: Sequence[Tensor], group: Group, site: str, step: int = 1) -> InFlight:
    return RIGHT_SHIFT(tensors, group, site, -step)


def documents_stay(tensors: Sequence[Tensor], group: Group, site: str, step: int = 1) -> InFlight:
    arrived = RIGHT_SHIFT(tensors, group, site, step).wait()
    return InFlight((arrived[0], *tensors[1:]))


def doubled_scatter(x: Tensor, group: Group, site: str) -> Tensor:
    return 2 * RIGHT_SCATTER(x, group, site)


def own_scatter(x: Tensor, group: Group, site: str) -> Tensor:
    return x[group.rank : group.rank + 1]


def own_documents(documents: Tensor, cp: Group) -> Tensor:
    return documents.repeat(1, cp.size)


def unsplit_groups(grad: Tensor, repeats: int) -> Tensor:
    return grad[:, ::repeats]


RIGHT_GATHER, RIGHT_SCORES = context_gather.gather_blocks, context_chunks._scores
RIGHT_SHIFT, RIGHT_SCATTER = collectives.shift, collectives.reduce_scatter
RIGHT_DOCUMENTS = Block.documents

# Name: method, whether the case has documents, where, what.
FAULTS: dict[str, tuple[str, bool, Any, str, Any]] = {
    "ring: outputs not rescaled": ("p2p", False, context_chunks, "share", last_wins),
    "gather: outputs not rescaled": ("all_gather", False, context_chunks, "share", last_wins),
    "ring: outputs averaged": ("p2p", False, context_chunks, "share", averaged),
    "ring: own block not causal": (
        "p2p",
        False,
        context_ring,
        "ring_block",
        ring_of(own_block_full),
    ),
    "ring: tail of earlier ranks": (
        "p2p",
        False,
        context_ring,
        "ring_block",
        ring_of(tail_of_earlier),
    ),
    "ring: all of earlier ranks": (
        "p2p",
        False,
        context_ring,
        "ring_block",
        ring_of(all_of_earlier),
    ),
    "ring: head sees later ranks": (
        "p2p",
        False,
        context_ring,
        "ring_block",
        ring_of(head_sees_later),
    ),
    "ring: keys do not travel": ("p2p", False, collectives, "shift", stays("cp.ring")),
    "ring: keys do not travel again": ("p2p", False, collectives, "shift", stays("cp.ring.again")),
    "ring: gradients do not travel": (
        "p2p",
        False,
        collectives,
        "shift",
        stays("cp.ring.backward"),
    ),
    "ring: other way round": ("p2p", False, collectives, "shift", other_way),
    "ring: documents stay at home": ("p2p", True, collectives, "shift", documents_stay),
    "ring: documents of other tokens": ("p2p", True, Block, "documents", without_documents),
    "ring: documents ignored": ("p2p", True, context_chunks, "_scores", forgetful_scores),
    "gather: earlier keys missing": (
        "all_gather",
        False,
        context_gather,
        "gather_blocks",
        without_earlier_keys,
    ),
    "gather: nothing causal": (
        "all_gather",
        False,
        context_gather,
        "gather_blocks",
        all_causal_full,
    ),
    "gather: keys in the ranks' order": (
        "all_gather",
        False,
        context_gather,
        "in_order",
        contiguous_chunks,
    ),
    "gather: gradients in the wrong order": (
        "all_gather",
        False,
        context_gather,
        "by_rank",
        contiguous_chunks,
    ),
    "gather: gradients doubled": (
        "all_gather",
        False,
        collectives,
        "reduce_scatter",
        doubled_scatter,
    ),
    "gather: gradients not summed": (
        "all_gather",
        False,
        collectives,
        "reduce_scatter",
        own_scatter,
    ),
    "gather: positions by local order": (
        "all_gather",
        True,
        context_gather,
        "local_positions",
        lambda length, cp, device: torch.arange(length // cp.size, device=device),
    ),
    "gather: own documents only": (
        "all_gather",
        True,
        context_gather,
        "all_documents",
        own_documents,
    ),
    "exchange: tokens in the ranks' order": (
        "a2a",
        False,
        context_exchange,
        "in_order",
        contiguous_chunks,
    ),
    "exchange: results in the wrong order": (
        "a2a",
        False,
        context_exchange,
        "by_rank",
        contiguous_chunks,
    ),
    "exchange: own documents only": ("a2a", True, context_exchange, "all_documents", own_documents),
    "groups: gradients of one head only": (
        "p2p",
        False,
        context_chunks,
        "per_group",
        unsplit_groups,
    ),
}


def _passes(rank: int) -> dict[str, tuple[bool, bool]]:
    """Whether the comparison is content without and with each fault, on this rank."""
    group = context_group(rank, CP)
    found = {}
    for name, (method, documents, where, attribute, wrong) in FAULTS.items():
        case = make_case((6, 2), 2 * CP * 5, documents=documents)
        kernel = context_kernel(method, group, chunks=MathChunks())
        right = on_ranks(case, kernel, group)
        with patch.object(where, attribute, wrong):
            faulty = on_ranks(case, kernel, group)
        found[name] = content(right, whole(case)), content(faulty, whole(case))
    return found


def content(parts: list[Tensor], exact: list[Tensor]) -> bool:
    output, *gradients = errors(parts, exact)
    return output <= OUTPUT and max(gradients) <= GRADIENTS


def test_every_fault_is_caught() -> None:
    for found in run_ranks(CP, _passes):
        assert [name for name, (right, _) in found.items() if not right] == []
        assert [name for name, (_, faulty) in found.items() if faulty] == []
