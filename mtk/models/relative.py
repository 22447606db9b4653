"""Learned biases by relative position (Raffel et al. 2020, section 2.1).

Small distances have a bucket each, larger ones share buckets that grow logarithmically. The
layers of a stack share one table.

Shape suffixes: B batch, H heads, S queries, T keys, N buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtk.config.model import ModelConfig


class RelativeBias(nn.Module):
    """distances [..., S, T] -> biases [..., H, S, T], the head taking the place of dimension -3.

    bidirectional: half of the buckets are for keys behind the query, half for those before it
    (encoders); otherwise all keys before the query share the first bucket with itself.
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.buckets, self.max_distance = buckets, max_distance
        self.bidirectional = bidirectional

    @classmethod
    def of(cls, config: ModelConfig, *, bidirectional: bool) -> RelativeBias:
        """The table that a model's options describe."""
        return cls(
            config.num_attention_heads,
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            bidirectional=bidirectional,
        )

    def forward(self, gaps: Tensor) -> Tensor:
        """gaps: int64 [..., 1, S, T], query position minus key position."""
        numbers = bucket_of(
            gaps[..., 0, :, :],
            buckets=self.buckets,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return self.weight[numbers].movedim(-1, -3)


def bucket_of(gaps: Tensor, *, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Bucket 0..N-1 of each distance query - key, int64 of the same shape."""
    start = torch.zeros_like(gaps)
    if bidirectional:
        buckets //= 2
        start = (gaps < 0).long() * buckets
        gaps = gaps.abs()
    else:
        gaps = gaps.clamp(min=0)
    exact = buckets // 2
    # As T5 was trained: in fp32 and rounded down.
    growth = (gaps.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    shared = exact + (growth * (buckets - exact)).long()
    return start + torch.where(gaps < exact, gaps, shared.clamp(max=buckets - 1))
