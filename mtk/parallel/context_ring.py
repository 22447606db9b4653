"""Context parallelism point to point: keys and values travel around the ring of ranks.

Ring attention (Liu et al. 2023) with head-tail balancing. Each step meets the local queries
with another rank's keys while the next ones are on their way. In backward the gradients of
keys and values travel along with them and arrive at home after a full turn.

Shape suffixes: B batch, H query heads, G key/value heads, S local tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtk.models.attention import CAUSAL, Form
from mtk.parallel import collectives
from mtk.parallel.context_chunks import Block, ChunkKernel, Documents, Merge
from mtk.parallel.context_fused import chunk_kernel
from mtk.parallel.groups import Group

WHOLE = slice(None)


def ring_block(rank: int, source: int, length: int) -> Block:
    """What the queries of ``rank`` see of the keys of ``source``, both [head, tail] of
    ``length`` tokens: of an earlier rank its head, of a later one with the own tail only.

    All other pairs of chunks are masked as a whole; each step costs every rank the same.
    """
    half = length // 2
    if source == rank:
        return Block(WHOLE, WHOLE, causal=True)
    if source < rank:
        return Block(WHOLE, slice(0, half), causal=False)
    return Block(slice(half, length), WHOLE, causal=False)


def forward_step(
    block: Block,
    q_BHSD: Tensor,
    kv: Tensor,
    documents: Documents | None,
    chunks: ChunkKernel,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one rank's keys and values, stacked as [2, B, G, S, D]."""
    k_BGKD, v_BGKD = kv[:, :, :, block.keys]
    own = block.documents(documents)
    return chunks.forward(q_BHSD[:, :, block.queries], k_BGKD, v_BGKD, block.causal, own)


def backward_step(
    block: Block,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    kv: Tensor,
    documents: Documents | None,
    chunks: ChunkKernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the block's queries, keys and values.

    saved: the output's gradient, the queries, the output and its log-sum-exp.
    """
    grad, q, out, lse = (x[:, :, block.queries] for x in saved)
    k_BGKD, v_BGKD = kv[:, :, :, block.keys]
    own = block.documents(documents)
    return chunks.backward(grad, q, k_BGKD, v_BGKD, out, lse, block.causal, own)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        documents_BS: Tensor | None,
        group: Group,
        chunks: ChunkKernel,
    ) -> Tensor:
        kv = torch.stack((k_BGSD, v_BGSD))
        merge, held = None, _travelling(kv, documents_BS)
        for step in range(group.size):
            last = step == group.size - 1
            arriving = None if last else collectives.shift(held, group, "cp.ring")
            block = ring_block(group.rank, (group.rank - step) % group.size, q_BHSD.shape[2])
            result = forward_step(block, q_BHSD, held[0], _pair(documents_BS, held), chunks)
            if merge is None:  # the own block, which every query takes part in
                merge = Merge(*result)
            else:
                merge.add(block.queries, *result)
            held = held if arriving is None else arriving.wait()
        assert merge is not None
        out_BHSD = merge.out_BHQD.to(q_BHSD.dtype)
        ctx.save_for_backward(q_BHSD, kv, out_BHSD, merge.lse_BHQ, documents_BS)
        ctx.group, ctx.chunks = group, chunks
        return out_BHSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHSD, kv, out_BHSD, lse_BHS, documents_BS = ctx.saved_tensors
        group, length = ctx.group, q_BHSD.shape[2]
        saved = (grad_BHSD.contiguous(), q_BHSD, out_BHSD, lse_BHS)
        # Summed over blocks and ranks in fp32, whatever the type of the keys.
        dq = torch.zeros_like(out_BHSD, dtype=lse_BHS.dtype)
        returning = collectives.InFlight((torch.zeros_like(kv, dtype=lse_BHS.dtype),))
        held = _travelling(kv, documents_BS)
        for step in range(group.size):
            last = step == group.size - 1
            arriving = None if last else collectives.shift(held, group, "cp.ring.again")
            block = ring_block(group.rank, (group.rank - step) % group.size, length)
            pair = _pair(documents_BS, held)
            grads = backward_step(block, saved, held[0], pair, ctx.chunks)
            dq[:, :, block.queries] += grads[0]
            (d_kv,) = returning.wait()
            d_kv[0, :, :, block.keys] += grads[1]
            d_kv[1, :, :, block.keys] += grads[2]
            # The sum is complete before it comes home: rounding it here halves the last message.
            leaving = d_kv.to(kv.dtype) if last else d_kv
            returning = collectives.shift((leaving,), group, "cp.ring.backward")
            held = held if arriving is None else arriving.wait()
        (d_kv,) = returning.wait()
        dk, dv = d_kv
        return dq.to(q_BHSD.dtype), dk, dv, None, None, None


def _travelling(kv: Tensor, documents_BS: Tensor | None) -> tuple[Tensor, ...]:
    """What goes around: the numbers of the keys' documents go with them."""
    return (kv,) if documents_BS is None else (kv, documents_BS)


def _pair(documents_BS: Tensor | None, held: Sequence[Tensor]) -> Documents | None:
    return None if documents_BS is None else (documents_BS, held[1])


@dataclass(frozen=True)
class RingKernel:
    """Attention kernel on local tokens. chunks: None takes the fastest for the tensors.

    Dropout is refused: a rank meets a block twice, forward and backward, and would have to
    draw the same mask for it.
    """

    group: Group
    chunks: ChunkKernel | None = None

    def __call__(
        self,
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        documents: Tensor | None = None,
        form: Form = CAUSAL,
        bias: Tensor | None = None,
    ) -> Tensor:
        if mask is not None or bias is not None or form != CAUSAL or dropout:
            raise ValueError(
                "ring attention is causal; it has neither masks, biases nor attention dropout"
            )
        chunks = self.chunks or chunk_kernel(q_BHSD, k_BGTD, v_BGTD, documents is not None)
        out: Tensor = _Ring.apply(q_BHSD, k_BGTD, v_BGTD, documents, self.group, chunks)  # type: ignore[no-untyped-call]
        return out
