"""Context parallelism by gathering: every rank has all keys and values for a while.

Each rank computes its own queries (Llama 3, section 3.3.2). Only the local part is kept for
backward, where keys and values are gathered again and their gradients summed and scattered.

Shape suffixes: B batch, H query heads, G key/value heads, S local tokens, T all tokens,
D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtk.models.attention import CAUSAL, AttentionKernel, Form
from mtk.parallel import collectives
from mtk.parallel.context_balance import by_rank, in_order, local_positions
from mtk.parallel.context_chunks import Block, ChunkKernel, Merge
from mtk.parallel.context_fused import chunk_kernel
from mtk.parallel.groups import Group


def gather_blocks(rank: int, cp: int, length: int) -> list[list[Block]]:
    """What ``length`` local queries see of all keys in order: head and tail chunk each their
    own keys causally, and all earlier ones."""
    half = length // 2
    found = []
    for local, chunk in ((0, rank), (1, 2 * cp - 1 - rank)):
        queries = slice(local * half, (local + 1) * half)
        blocks = [Block(queries, slice(chunk * half, (chunk + 1) * half), causal=True)]
        if chunk:
            blocks.append(Block(queries, slice(0, chunk * half), causal=False))
        found.append(blocks)
    return found


def forward_blocks(
    blocks: list[Block], q_BHSD: Tensor, kv: Tensor, chunks: ChunkKernel
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one chunk of queries; kv: of all tokens [2, B, G, T, D]."""
    results = []
    for block in blocks:
        k_BGKD, v_BGKD = kv[:, :, :, block.keys]
        q_BHQD = q_BHSD[:, :, block.queries]
        results.append(chunks.forward(q_BHQD, k_BGKD, v_BGKD, block.causal, None))
    merge = Merge(*results[0])
    for result in results[1:]:
        merge.add(slice(None), *result)
    return merge.out_BHQD, merge.lse_BHQ


def backward_blocks(
    blocks: list[Block],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    kv: Tensor,
    chunks: ChunkKernel,
    dq: Tensor,
    d_kv: Tensor,
) -> None:
    """Add the gradients of these blocks to ``dq`` and ``d_kv``; saved: as for the ring."""
    for block in blocks:
        grad, q, out, lse = (x[:, :, block.queries] for x in saved)
        k_BGKD, v_BGKD = kv[:, :, :, block.keys]
        grads = chunks.backward(grad, q, k_BGKD, v_BGKD, out, lse, block.causal, None)
        dq[:, :, block.queries] += grads[0]
        d_kv[0, :, :, block.keys] += grads[1]
        d_kv[1, :, :, block.keys] += grads[2]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        group: Group,
        chunks: ChunkKernel,
    ) -> Tensor:
        kv = torch.stack((k_BGSD, v_BGSD))
        all_kv = _all_tokens(kv, group, "cp.gather")
        parts = [
            forward_blocks(blocks, q_BHSD, all_kv, chunks)
            for blocks in gather_blocks(group.rank, group.size, q_BHSD.shape[2])
        ]
        out_BHSD, lse_BHS = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        out_BHSD = out_BHSD.to(q_BHSD.dtype)
        ctx.save_for_backward(q_BHSD, kv, out_BHSD, lse_BHS)
        ctx.group, ctx.chunks = group, chunks
        return out_BHSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHSD, kv, out_BHSD, lse_BHS = ctx.saved_tensors
        group, chunks = ctx.group, ctx.chunks
        all_kv = _all_tokens(kv, group, "cp.gather.again")
        # Summed over blocks and ranks in fp32, whatever the type of the keys.
        dq = torch.zeros_like(out_BHSD, dtype=lse_BHS.dtype)
        d_kv = torch.zeros_like(all_kv, dtype=lse_BHS.dtype)
        saved = (grad_BHSD.contiguous(), q_BHSD, out_BHSD, lse_BHS)
        for blocks in gather_blocks(group.rank, group.size, q_BHSD.shape[2]):
            backward_blocks(blocks, saved, all_kv, chunks, dq, d_kv)
        parts = torch.unflatten(by_rank(d_kv, group.size, 3), 3, (group.size, -1)).movedim(3, 0)
        d_kv = collectives.reduce_scatter(parts, group, "cp.gather.backward")[0].to(kv.dtype)
        return dq.to(q_BHSD.dtype), d_kv[0], d_kv[1], None, None


def _all_tokens(kv: Tensor, group: Group, site: str) -> Tensor:
    """Local [2, B, G, S, D] -> of all tokens in order [2, B, G, T, D]."""
    parts = collectives.all_gather(kv[None], group, site)
    return in_order(parts.movedim(0, 3).flatten(3, 4), group.size, 3)


@dataclass(frozen=True)
class GatherKernel:
    """Attention kernel on local tokens.

    Without documents and dropout it works on chunks (None takes the fastest kernel for the
    tensors); else ``inner`` gets all keys and a mask.
    """

    group: Group
    inner: AttentionKernel
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
        if mask is not None or bias is not None or form != CAUSAL:
            raise ValueError(
                "gathered keys take no masks or biases, only causal attention and documents"
            )
        if dropout or documents is not None:
            return self._masked(q_BHSD, torch.stack((k_BGTD, v_BGTD)), dropout, documents)
        chunks = self.chunks or chunk_kernel(q_BHSD, k_BGTD, v_BGTD, documents=False)
        out: Tensor = _Gathered.apply(q_BHSD, k_BGTD, v_BGTD, self.group, chunks)  # type: ignore[no-untyped-call]
        return out

    def _masked(
        self, q_BHSD: Tensor, kv: Tensor, dropout: float, documents_BS: Tensor | None
    ) -> Tensor:
        cp, total = self.group, kv.shape[3] * self.group.size
        parts = collectives.gather_rows(kv[None], cp, "cp.gather")
        k_BGTD, v_BGTD = in_order(parts.movedim(0, 3).flatten(3, 4), cp.size, 3)
        own_S = local_positions(total, cp, q_BHSD.device)
        mask = own_S[:, None] >= torch.arange(total, device=q_BHSD.device)
        if documents_BS is not None:
            all_BT = all_documents(documents_BS, cp)
            mask = (mask & (documents_BS[:, :, None] == all_BT[:, None, :]))[:, None]
        return self.inner(q_BHSD, k_BGTD, v_BGTD, mask=mask, dropout=dropout)


def all_documents(documents_BS: Tensor, cp: Group) -> Tensor:
    """Documents of all tokens in order, int64 [B, T]."""
    parts_TB = collectives.all_gather(documents_BS.t(), cp, "cp.documents")
    return in_order(parts_TB, cp.size, 0).t()
