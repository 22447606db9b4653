"""The ranks of a context-parallel group one after another in one process.

Uses the same steps, blocks and merging as the ranks do, without communication, so that the
chunk kernels of one device can be checked on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.parallel.context_balance import cut, in_order
from mtk.parallel.context_chunks import ChunkKernel, Merge
from mtk.parallel.context_gather import gather_blocks
from mtk.parallel.context_ring import backward_step, forward_step, ring_block
from mtk.parallel.groups import Group
from tests.parallel.attention_cases import Case


def parts(x: Tensor, cp: int, dim: int) -> list[Tensor]:
    """What each rank holds."""
    return [cut(x, Group("cp", tuple(range(cp)), rank), dim) for rank in range(cp)]


def ring(case: Case, cp: int, chunks: ChunkKernel) -> list[Tensor]:
    """Output and gradients of q, k and v as ``cp`` ranks of a ring compute them."""
    q, grad = parts(case.q, cp, 2), parts(case.grad, cp, 2)
    kv = [torch.stack(pair) for pair in zip(parts(case.k, cp, 2), parts(case.v, cp, 2))]  # noqa: B905
    documents = None if case.documents is None else parts(case.documents, cp, 1)
    outs, dqs = [], []
    d_kv = [
        torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in kv
    ]
    for rank in range(cp):
        sources = [(rank - step) % cp for step in range(cp)]
        pairs = [None if documents is None else (documents[rank], documents[s]) for s in sources]
        blocks = [ring_block(rank, source, q[rank].shape[2]) for source in sources]
        merge = Merge(q[rank])
        for source, block, pair in zip(sources, blocks, pairs, strict=True):
            forward_step(merge, block, q[rank], kv[source], pair, chunks)
        out = merge.out_BHQD.to(case.q.dtype)
        dq = torch.zeros_like(merge.out_BHQD)
        saved = (grad[rank].contiguous(), q[rank], out, merge.lse_BHQ)
        for source, block, pair in zip(sources, blocks, pairs, strict=True):
            dq_block, d_kv_block = backward_step(block, saved, kv[source], pair, chunks)
            dq[:, :, block.queries] += dq_block
            d_kv[source][:, :, :, block.keys] += d_kv_block
        outs.append(out)
        dqs.append(dq)
    dk, dv = in_order(torch.cat(d_kv, 3), cp, 3)
    return [in_order(torch.cat(outs, 2), cp, 2), in_order(torch.cat(dqs, 2), cp, 2), dk, dv]


def gathered(case: Case, cp: int, chunks: ChunkKernel) -> list[Tensor]:
    """As :func:`ring`, with all keys gathered and no documents."""
    outs, dqs = [], []
    wide = torch.promote_types(case.k.dtype, torch.float32)
    dk, dv = torch.zeros_like(case.k, dtype=wide), torch.zeros_like(case.v, dtype=wide)
    for rank in range(cp):
        q, grad = parts(case.q, cp, 2)[rank], parts(case.grad, cp, 2)[rank]
        blocks, merge = gather_blocks(rank, cp, q.shape[2]), Merge(q)
        for b in blocks:
            k, v = case.k[:, :, b.keys], case.v[:, :, b.keys]
            merge.add(b.queries, *chunks.forward(q[:, :, b.queries], k, v, b.causal, None))
        out, dq = merge.out_BHQD.to(q.dtype), torch.zeros_like(merge.out_BHQD)
        for b in blocks:
            g, own, o, lse = (x[:, :, b.queries] for x in (grad, q, out, merge.lse_BHQ))
            k, v = case.k[:, :, b.keys], case.v[:, :, b.keys]
            grads = chunks.backward(g, own, k, v, o, lse, b.causal, None)
            dq[:, :, b.queries] += grads[0]
            dk[:, :, b.keys] += grads[1]
            dv[:, :, b.keys] += grads[2]
        outs.append(out)
        dqs.append(dq)
    return [in_order(torch.cat(outs, 2), cp, 2), in_order(torch.cat(dqs, 2), cp, 2), dk, dv]
