"""Attention of new tokens to blocks of the cache, in plain PyTorch.

Shape suffixes: N new tokens of any sequences, S of one, B sequences of one new token each, T
all tokens of one, W blocks of a table, H query heads, G key/value heads, P tokens of a block, D
channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtk.models.attention import Attention, Form, sdpa_kernel
from serving.paged.storage import Storage


class Attend(Protocol):
    """Attention of one forward pass."""

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        """Of all tokens' queries to what ``layer`` has stored. k, v: of the new tokens, which are
        stored already."""

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor | None:
        """All that lies between the projections of ``own``, [N, H, D], if this can do it at once:
        norms, rotation, storing, attention."""


def attend_blocks(
    q_BHD: Tensor,
    keys_KGPD: Tensor,
    values_KGPD: Tensor,
    table_BW: Tensor,
    lengths_B: Tensor,
    window: int | None = None,
) -> Tensor:
    """One query a sequence: [B, H, D]. The formula that :mod:`mtk.kernels.decode_attention` is
    checked against; it copies every block it reads.

    lengths: tokens of each sequence, the new one among them.
    """
    keys, values = keys_KGPD[table_BW], values_KGPD[table_BW]
    k_BGTD = keys.transpose(1, 2).flatten(2, 3)
    v_BGTD = values.transpose(1, 2).flatten(2, 3)
    seen_T = torch.arange(k_BGTD.shape[2], device=q_BHD.device)
    mask_BT = seen_T < lengths_B[:, None]
    if window is not None:
        mask_BT = mask_BT & (seen_T >= lengths_B[:, None] - window)
    # What an earlier sequence left behind may be NaN, which a mask alone does not hide.
    hidden = ~mask_BT[:, None, :, None]
    k_BGTD.masked_fill_(hidden, 0)
    v_BGTD.masked_fill_(hidden, 0)
    mask = mask_BT[:, None, None]
    return sdpa_kernel(q_BHD[:, :, None], k_BGTD, v_BGTD, mask=mask, dropout=0.0)[:, :, 0]


@dataclass(frozen=True)
class DecodeAttention:
    """One new token a sequence, through tables [B, W]; works anywhere."""

    storage: Storage
    table_BW: Tensor
    lengths_B: Tensor
    window: int | None

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        keys, values = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        return attend_blocks(q_NHD, keys, values, self.table_BW, self.lengths_B, self.window)

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``start + count`` of one sequence. blocks_W: int64, its blocks."""

    start: int
    count: int
    blocks_W: Tensor


@dataclass(frozen=True)
class PrefillAttention:
    """Spans of several sequences, one after the other in N; each sees its own tokens only."""

    storage: Storage
    spans: Sequence[Span]
    form: Form

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        if self.alike:
            return self._alike(self.spans[0].count, q_NHD, k_NGD, v_NGD)
        done, outs = 0, []
        for span in self.spans:
            own = slice(done, done + span.count)
            outs.append(self._one(layer, span, q_NHD[own], k_NGD[own], v_NGD[own]))
            done += span.count
        return torch.cat(outs)

    @property
    def alike(self) -> bool:
        """Whether all spans are whole beginnings of one length."""
        first = self.spans[0]
        return all(span.start == 0 and span.count == first.count for span in self.spans)

    def _alike(self, count: int, *heads_N: Tensor) -> Tensor:
        """Whole beginnings of one length, at once; a single one too."""
        q, k, v = (x.view(-1, count, *x.shape[1:]).transpose(1, 2) for x in heads_N)
        out_BHSD = sdpa_kernel(q, k, v, mask=None, dropout=0.0, form=self.form)
        return out_BHSD.transpose(1, 2).flatten(0, 1)

    def whole(self, layer: int, own: Attention, qkv: Tensor) -> Tensor | None:
        return None

    def _one(self, layer: int, span: Span, q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> Tensor:
        if span.start == 0:
            return self._alike(span.count, q_SHD, k_SGD, v_SGD)
        k, v = self._seen(layer, span)
        mask = self._mask(span, q_SHD.device)
        out = sdpa_kernel(q_SHD.transpose(0, 1)[None], k, v, mask=mask, dropout=0.0)
        return out[0].transpose(0, 1)

    def _seen(self, layer: int, span: Span) -> tuple[Tensor, Tensor]:
        """Keys and values [1, G, T, D] of all tokens up to the span's end, no more."""
        length = span.start + span.count
        stores = self.storage.keys_KGPD[layer], self.storage.values_KGPD[layer]
        found = (store[span.blocks_W].transpose(0, 1).flatten(1, 2) for store in stores)
        k, v = (x_GTD[None, :, :length] for x_GTD in found)
        return k, v

    def _mask(self, span: Span, device: torch.device) -> Tensor:
        queries_S = torch.arange(span.start, span.start + span.count, device=device)
        keys_T = torch.arange(span.start + span.count, device=device)
        gaps_ST = queries_S[:, None] - keys_T
        mask = gaps_ST >= 0
        return mask if self.form.window is None else mask & (gaps_ST < self.form.window)
