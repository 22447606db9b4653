"""What some models add to the scores of attention instead of embedding positions.

ALiBi (Press et al. 2022): each head lowers a score by its slope times the distance. The learned
kind is :mod:`mtk.models.relative`. Either is made once for all layers, with everything that
limits where a token looks folded in, so that layers share one tensor.

Shape suffixes: B batch, H heads, S queries, T keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtk.models.attention import Form, document_mask, form_mask


def alibi_slopes(heads: int) -> Tensor:
    """fp32 [H]: 2^(-8/n), 2^(-16/n), ... for n heads, a power of two. Of other numbers the
    first ones are those of the power below, the rest every other one of the power above."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * k / below) for k in range(1, below + 1)]
    slopes += [2.0 ** (-4.0 * k / below) for k in range(1, 2 * (heads - below), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def distances(queries: Tensor, keys_T: Tensor) -> Tensor:
    """How far each key lies behind its query, negative if before it: [1 or B, 1, S, T].

    queries: positions int64 [S] or [B, S]; keys_T: int64 [T] or [B, T].
    """
    gaps = queries[..., :, None] - keys_T[..., None, :]
    return gaps[:, None] if gaps.ndim == 3 else gaps[None, None]


def alibi_bias(slopes_H: Tensor, gaps: Tensor) -> Tensor:
    """fp32 [1 or B, H, S, T] to be added to scores."""
    return -slopes_H[:, None, None] * gaps


def with_masks(
    bias: Tensor, mask: Tensor | None, documents_BS: Tensor | None, form: Form
) -> Tensor:
    """``bias`` with -inf wherever a query may not look; arguments as for attention kernels."""
    if documents_BS is not None:
        mask = document_mask(documents_BS, form)
    elif mask is None:
        mask = form_mask(bias.shape[-1], form, bias.device)
    return bias.masked_fill(~mask, float("-inf"))
