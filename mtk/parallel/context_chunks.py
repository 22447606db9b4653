"""Attention of some queries to some keys, with what is needed to merge it with the rest.

Softmax over all keys is the sum of the softmaxes over parts of them, each weighted by the
exponential of its log-sum-exp (Milakov & Gimelshein 2018). Backward needs no merging: given
the log-sum-exp over *all* keys, the gradients of the parts add up (Dao et al. 2022).

Shape suffixes: B batch, H query heads, G key/value heads, Q queries, K keys, D channels,
T queries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Scores that the formula written out holds in memory at once (fp32: 256 MB).
SCORES = 2**26

# Numbers of the packed document of each query and of each key: int64 [B, Q] and [B, K].
Documents = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Block:
    """Which local queries meet which keys, as slices of their sequence dimensions.

    causal: as many keys as queries, and query i sees keys 0..i; else it sees all of them.
    """

    queries: slice
    keys: slice
    causal: bool

    def documents(self, documents: Documents | None) -> Documents | None:
        """Those of the block's own queries and keys."""
        if documents is None:
            return None
        return documents[0][:, self.queries], documents[1][:, self.keys]


class ChunkKernel(Protocol):
    """softmax(q k^T / sqrt(D)) v of a block and its gradients.

    documents: queries see keys of the same number only; None: of all.
    """

    def forward(
        self,
        q_BHQD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor]:
        """The output [B, H, Q, D], in fp32 or the type of q, and the log-sum-exp of the scores,
        fp32 [B, H, Q]; a query without a key has output 0 and log-sum-exp -inf."""
        ...

    def backward(
        self,
        grad_BHQD: Tensor,
        q_BHQD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        out_BHQD: Tensor,
        lse_BHQ: Tensor,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v; ``out`` and ``lse`` are those over all keys, merged."""
        ...


class Merge:
    """Output and log-sum-exp over the blocks so far, in fp32.

    Starts from the result of a block that all queries take part in.
    """

    def __init__(self, out_BHQD: Tensor, lse_BHQ: Tensor) -> None:
        self.out_BHQD, self.lse_BHQ = _wide(out_BHQD).contiguous(), lse_BHQ.contiguous()

    def add(self, queries: slice, out_BHQD: Tensor, lse_BHQ: Tensor) -> None:
        """Take in the result of another block of these queries."""
        before_BHQ = self.lse_BHQ[:, :, queries]
        share_BHQ = share(lse_BHQ, before_BHQ)
        self.out_BHQD[:, :, queries].lerp_(_wide(out_BHQD), share_BHQ[..., None])
        self.lse_BHQ[:, :, queries] = torch.logaddexp(before_BHQ, lse_BHQ)


def share(lse: Tensor, other: Tensor) -> Tensor:
    """Weight of the keys with the one log-sum-exp beside those with the other."""
    return (_finite(lse) - _finite(other)).sigmoid()


class MathChunks:
    """The formula written out in fp32, some queries at a time: any device, type and mask."""

    def forward(
        self,
        q_BHQD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor]:
        repeats = q_BHQD.shape[1] // k_BGKD.shape[1]
        k_BHKD, v_BHKD = per_head(_wide(k_BGKD), repeats), per_head(_wide(v_BGKD), repeats)
        outs, lses = [], []
        for rows in _tiles(q_BHQD, k_BGKD):
            scores_BHTK = _scores(q_BHQD, k_BHKD, rows, causal, documents)
            lse_BHT = scores_BHTK.logsumexp(dim=-1)
            outs.append((scores_BHTK - _finite(lse_BHT)[..., None]).exp() @ v_BHKD)
            lses.append(lse_BHT)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self,
        grad_BHQD: Tensor,
        q_BHQD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        out_BHQD: Tensor,
        lse_BHQ: Tensor,
        causal: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        repeats = q_BHQD.shape[1] // k_BGKD.shape[1]
        k_BHKD, v_BHKD = per_head(_wide(k_BGKD), repeats), per_head(_wide(v_BGKD), repeats)
        scale = q_BHQD.shape[-1] ** -0.5
        dq, dk, dv = [], torch.zeros_like(k_BHKD), torch.zeros_like(v_BHKD)
        for rows in _tiles(q_BHQD, k_BGKD):
            grad_BHTD = _wide(grad_BHQD[:, :, rows])
            scores_BHTK = _scores(q_BHQD, k_BHKD, rows, causal, documents)
            weights_BHTK = (scores_BHTK - lse_BHQ[:, :, rows, None]).exp()
            shares_BHT = (grad_BHTD * out_BHQD[:, :, rows]).sum(-1)
            d_weights_BHTK = grad_BHTD @ v_BHKD.transpose(-1, -2)
            d_scores_BHTK = weights_BHTK * (d_weights_BHTK - shares_BHT[..., None]) * scale
            dq.append(d_scores_BHTK @ k_BHKD)
            dk += d_scores_BHTK.transpose(-1, -2) @ _wide(q_BHQD[:, :, rows])
            dv += weights_BHTK.transpose(-1, -2) @ grad_BHTD
        grads = torch.cat(dq, 2), per_group(dk, repeats), per_group(dv, repeats)
        return grads[0].to(q_BHQD.dtype), grads[1].to(k_BGKD.dtype), grads[2].to(v_BGKD.dtype)


def per_head(x_BGKD: Tensor, repeats: int) -> Tensor:
    """Each key/value head once for each of its query heads."""
    return x_BGKD if repeats == 1 else x_BGKD.repeat_interleave(repeats, dim=1)


def per_group(grad_BHKD: Tensor, repeats: int) -> Tensor:
    """The gradient of what :func:`per_head` was given."""
    return grad_BHKD if repeats == 1 else torch.unflatten(grad_BHKD, 1, (-1, repeats)).sum(2)


def _scores(
    q_BHQD: Tensor, k_BHKD: Tensor, rows: slice, causal: bool, documents: Documents | None
) -> Tensor:
    """[B, H, T, K] of the queries in ``rows``, -inf where they may not look."""
    q_BHTD = _wide(q_BHQD[:, :, rows])
    scores_BHTK: Tensor = q_BHTD @ k_BHKD.transpose(-1, -2) * q_BHTD.shape[-1] ** -0.5
    if causal:
        size = (q_BHTD.shape[2], k_BHKD.shape[2])
        later = torch.ones(size, dtype=torch.bool, device=q_BHTD.device).triu(rows.start + 1)
        scores_BHTK.masked_fill_(later, -torch.inf)
    if documents is not None:
        other_BTK = documents[0][:, rows, None] != documents[1][:, None, :]
        scores_BHTK.masked_fill_(other_BTK[:, None], -torch.inf)
    return scores_BHTK


def _tiles(q_BHQD: Tensor, k_BGKD: Tensor) -> Iterator[slice]:
    queries = q_BHQD.shape[2]
    per_query = q_BHQD.shape[0] * q_BHQD.shape[1] * k_BGKD.shape[2]
    rows = max(1, SCORES // max(1, per_query))
    for start in range(0, queries, rows):
        yield slice(start, min(start + rows, queries))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _finite(lse: Tensor) -> Tensor:
    """-inf (no key at all) becomes finite, so that exp(-inf - lse) is 0 and not NaN."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)
