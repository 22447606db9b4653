"""Norms, scale and rotation of queries and keys that lie side by side, in place.

Shape suffixes: N tokens, M heads of queries and keys, D channels of a head, R rotated channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.models.attention import Attention


def rotate_heads(
    heads_NMD: Tensor,
    queries: int,
    keys: int,
    own: Attention,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """What :class:`mtk.models.attention.Attention` does to queries and keys before it stores them,
    to the first ``queries`` and the next ``keys`` heads.

    rotary: cosines and sines [N, 1, R], in the heads' precision, the latter with the signs of
    :func:`signed`.
    """
    q_NHD, k_NGD = heads_NMD[:, :queries], heads_NMD[:, queries : queries + keys]
    if own.query_scale is not None:
        q_NHD *= own.query_scale
    if own.query_norm is not None and own.key_norm is not None:
        q_NHD.copy_(own.query_norm(q_NHD))
        k_NGD.copy_(own.key_norm(k_NGD))
    if rotary is None:
        return
    cos, sin = rotary
    both_NMR = heads_NMD[:, : queries + keys, : cos.shape[-1]]
    swapped = _swapped(both_NMR, own.interleaved)
    both_NMR.mul_(cos).add_(swapped.mul_(sin))


def signed(sin: Tensor, *, interleaved: bool) -> Tensor:
    """Sines [..., R], negative for the first channel of each pair."""
    sin = sin.clone()
    if interleaved:
        sin[..., ::2].neg_()
    else:
        sin[..., : sin.shape[-1] // 2].neg_()
    return sin


def _swapped(x_NMR: Tensor, interleaved: bool) -> Tensor:
    """Each channel's partner in its place, a copy."""
    if interleaved:
        return torch.stack((x_NMR[..., 1::2], x_NMR[..., ::2]), dim=-1).flatten(-2)
    first, second = x_NMR.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)
