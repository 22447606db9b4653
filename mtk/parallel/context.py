"""Context parallelism: the tokens of each sequence are shared over ranks.

Only attention looks at other tokens, so only its kernel changes; everything else works on
local tokens with their global positions (:func:`local_positions`). Three ways to bring
queries and keys together, all exact: a ring, gathering keys and values, or exchanging heads
for tokens.

Kernels are left out of compiled regions (``torch.compiler.disable``): they consist of
communication and opaque kernels, and the compiler fuses what lies around them.
"""

from __future__ import annotations

import torch

from mtk.models.attention import AttentionKernel, sdpa_kernel
from mtk.parallel.context_balance import cut, join, local_positions
from mtk.parallel.context_chunks import ChunkKernel
from mtk.parallel.context_exchange import ExchangeKernel
from mtk.parallel.context_gather import GatherKernel
from mtk.parallel.context_ring import RingKernel
from mtk.parallel.groups import Group

__all__ = ["context_kernel", "cut", "join", "local_positions"]


def context_kernel(
    method: str,
    cp: Group,
    inner: AttentionKernel = sdpa_kernel,
    chunks: ChunkKernel | None = None,
) -> AttentionKernel:
    """The kernel for local q [B, H, S/cp, D] and k, v [B, G, S/cp, D], head and tail chunk.

    method: as ``ParallelConfig.cp_comm_type``. inner: computes whole attention where that is
    needed (a2a; all_gather with documents or dropout). chunks: computes the blocks of p2p and
    all_gather; None takes the fastest for the tensors. ``documents`` of a call are the local
    [B, S/cp]; ``mask`` must be None. With one rank it is ``inner``.
    """
    if cp.size == 1:
        return inner
    kernels: dict[str, AttentionKernel] = {
        "p2p": RingKernel(cp, chunks),
        "all_gather": GatherKernel(cp, inner, chunks),
        "a2a": ExchangeKernel(cp, inner),
    }
    kernel: AttentionKernel = torch.compiler.disable(kernels[method])  # type: ignore[no-untyped-call]
    return kernel
