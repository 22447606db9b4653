"""Attention of new tokens of several sequences to all of theirs in one call, on CUDA: torch's flash
attention for sequences of unequal lengths (Dao 2023).

Shape suffixes: N new tokens of all spans, T all tokens of the spans' sequences, H query heads, G
key/value heads, D channels of a head, K blocks, P tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from mtk.kernels.transfer import send
from mtk.models.attention import Form
from serving.paged.attention import Span


@dataclass(frozen=True, eq=False)
class FlashSpans:
    """Spans of one pass, laid out once for all layers. block: tokens of a block of the cache."""

    spans: Sequence[Span]
    form: Form
    block: int

    def __call__(
        self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, keys_KGPD: Tensor, values_KGPD: Tensor
    ) -> Tensor:
        """[N, H, D], 16-bit. Spans lie one after the other in N; what they look at before their
        own tokens is in the cache already, as are these."""
        new, seen = self._lengths
        if any(span.start for span in self.spans):
            k_NGD, v_NGD = (x.transpose(1, 2)[self._places] for x in (keys_KGPD, values_KGPD))
        window = self.form.window
        # Queries are the last of their sequence's tokens: the mask is aligned at its end.
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q_NHD, k_NGD, v_NGD, *self._ends, max(new), max(seen), 0.0, True, False,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )[0]  # fmt: skip
        return out

    @property
    def _lengths(self) -> tuple[list[int], list[int]]:
        """Of each span its new tokens, and all up to its end."""
        new = [span.count for span in self.spans]
        return new, [span.start + span.count for span in self.spans]

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """Where the spans end among the new tokens, and among all; int32, from 0."""
        device = self.spans[0].blocks_W.device
        new, seen = (
            send(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device)
            for counts in self._lengths
        )
        return new, seen

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Of all tokens up to each span's end the block, and the place in it."""
        blocks, places = [], []
        for span, seen in zip(self.spans, self._lengths[1], strict=True):
            at = torch.arange(seen, device=span.blocks_W.device)
            blocks.append(span.blocks_W[at // self.block])
            places.append(at % self.block)
        return torch.cat(blocks), torch.cat(places)
