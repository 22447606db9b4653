"""Attention of new tokens of several sequences to all of theirs in one call, on CUDA: torch's flash
attention for sequences of unequal lengths (Dao 2023).

Shape suffixes: N new tokens of all spans, T all tokens of the spans' sequences, H query heads, G
key/value heads, D channels of a head, K blocks, P tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mtk.kernels.transfer import send
from mtk.models.attention import Form
from serving.paged.attention import Span


def attend_spans(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    keys_KGPD: Tensor,
    values_KGPD: Tensor,
    spans: Sequence[Span],
    form: Form,
) -> Tensor:
    """[N, H, D], 16-bit. Spans lie one after the other in N; what they look at before their own
    tokens is in the cache already, as are these."""
    device = q_NHD.device
    new, seen = [span.count for span in spans], [span.start + span.count for span in spans]
    if any(span.start for span in spans):
        k_NGD, v_NGD = (_gathered(store, spans) for store in (keys_KGPD, values_KGPD))
    ends_new = send(torch.tensor([0, *accumulate(new)], dtype=torch.int32), device)
    ends_seen = send(torch.tensor([0, *accumulate(seen)], dtype=torch.int32), device)
    # Queries are the last of their sequence's tokens: the mask is aligned at its end.
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q_NHD, k_NGD, v_NGD, ends_new, ends_seen, max(new), max(seen), 0.0, True, False,
        window_size_left=None if form.window is None else form.window - 1,
        window_size_right=None if form.window is None else 0,
    )[0]  # fmt: skip
    return out


def _gathered(store_KGPD: Tensor, spans: Sequence[Span]) -> Tensor:
    """[T, G, D] of all tokens up to each span's end."""
    parts = []
    for span in spans:
        found_GTD = store_KGPD[span.blocks_W].transpose(1, 2).flatten(0, 1)
        parts.append(found_GTD[: span.start + span.count])
    return parts[0] if len(parts) == 1 else torch.cat(parts)
