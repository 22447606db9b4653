"""The ranks of a context-parallel group one after another in one process.

Uses the same steps, blocks and merging as the ranks do, without communication, so that the
chunk kernels of one device can be checked on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.parallel.context_balance import cut, in_order
from mtk.parallel.context_chunks import ChunkKernel, Merge
from mtk.parallel.context_gather import backward_blocks, forward_blocks, gather_blocks
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
        steps = list(zip(sources, blocks, pairs, strict=True))
        results = [forward_step(b, q[rank], kv[s], pair, chunks) for s, b, pair in steps]
        merge = Merge(*results[0])
        for block, result in zip(blocks[1:], results[1:], strict=True):
            merge.add(block.queries, *result)
        out = merge.out_BHQD.to(case.q.dtype)
        dq = torch.zeros_like(merge.out_BHQD)
        saved = (grad[rank].contiguous(), q[rank], out, merge.lse_BHQ)
        for source, block, pair in steps:
            grads = backward_step(block, saved, kv[source], pair, chunks)
            dq[:, :, block.queries] += grads[0]
            d_kv[source][0, :, :, block.keys] += grads[1]
            d_kv[source][1, :, :, block.keys] += grads[2]
        outs.append(out)
        dqs.append(dq)
    dk, dv = in_order(torch.cat(d_kv, 3), cp, 3)
    return [in_order(torch.cat(outs, 2), cp, 2), in_order(torch.cat(dqs, 2), cp, 2), dk, dv]


def gathered(case: Case, cp: int, chunks: ChunkKernel) -> list[Tensor]:
    """As :func:`ring`, with all keys gathered and no documents."""
    outs, dqs = [], []
    kv = torch.stack((case.k, case.v))
    d_kv = torch.zeros_like(kv, dtype=torch.promote_types(kv.dtype, torch.float32))
    for q, grad, rank in zip(parts(case.q, cp, 2), parts(case.grad, cp, 2), range(cp), strict=True):
        chunked = gather_blocks(rank, cp, q.shape[2])
        results = [forward_blocks(blocks, q, kv, chunks) for blocks in chunked]
        out, lse = (torch.cat(pair, 2) for pair in zip(*results, strict=True))
        dq = torch.zeros_like(out)
        saved = (grad.contiguous(), q, out.to(q.dtype), lse)
        for blocks in chunked:
            backward_blocks(blocks, saved, kv, chunks, dq, d_kv)
        outs.append(saved[2])
        dqs.append(dq)
    dk, dv = d_kv
    return [in_order(torch.cat(outs, 2), cp, 2), in_order(torch.cat(dqs, 2), cp, 2), dk, dv]
