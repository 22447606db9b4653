"""The state-space model of Mamba-2 (Dao & Gu 2024) in plain PyTorch.

A head keeps a state [P, N] that decays and takes in a token, and reads it out:

    state_t = exp(dt_t a) state_(t-1) + dt_t x_t B_t^T        y_t = state_t C_t + skip x_t

:func:`recurrent` computes just that, token after token. :func:`chunked` computes the same in
matrix form (section 6 of the paper): inside a chunk every token looks at those before it as in
attention, with a decay for each pair instead of a softmax; chunks hand on their states alone.
Sums of logarithms are taken in fp64 and states are fp32, whatever the model computes in: the
difference of two long sums in fp32 would lose the decay of neighbouring tokens.

Shape suffixes: B batch, S tokens, H heads, P channels of a head, G groups of heads that share B
and C, R heads of a group (H = G x R), N state of a channel, K chunks, Q tokens of a chunk (two
of them: Q looking at L).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Scan(Protocol):
    """The state-space model over whole sequences.

    dt_BSH: step sizes, fp32, positive. a_H: decay rates, fp32, negative. skip_H: how much of x
    goes straight to the output. documents_BS: int64, a number per packed document: a state
    does not outlive its document (not together with ``state``). state: [B, H, P, N] before the
    first token, fp32; None is zero.

    Returns y [B, S, H, P] in x's type, and the state after the last token.
    """

    def __call__(
        self,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        a_H: Tensor,
        b_BSGN: Tensor,
        c_BSGN: Tensor,
        skip_H: Tensor,
        *,
        chunk: int,
        documents_BS: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def recurrent(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    a_H: Tensor,
    b_BSGN: Tensor,
    c_BSGN: Tensor,
    skip_H: Tensor,
    *,
    chunk: int = 1,
    documents_BS: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token after token: the formula itself, and what generation runs for each new token."""
    del chunk
    batch, length, heads, width = x_BSHP.shape
    repeats = heads // b_BSGN.shape[2]
    b_BSHN = b_BSGN.float().repeat_interleave(repeats, dim=2)
    c_BSHN = c_BSGN.float().repeat_interleave(repeats, dim=2)
    x = x_BSHP.float()
    decay_BSH = (dt_BSH * a_H).exp()
    if state is None:
        state = x.new_zeros(batch, heads, width, b_BSGN.shape[3])
    outputs = []
    for token in range(length):
        if documents_BS is not None and token:
            same_B = documents_BS[:, token] == documents_BS[:, token - 1]
            state = state * same_B[:, None, None, None]
        inflow_BHP = dt_BSH[:, token, :, None] * x[:, token]
        state = decay_BSH[:, token, :, None, None] * state
        state = state + inflow_BHP[..., None] * b_BSHN[:, token, :, None, :]
        outputs.append((state @ c_BSHN[:, token, :, :, None])[..., 0])
    y_BSHP = torch.stack(outputs, dim=1) + skip_H[:, None] * x
    return y_BSHP.to(x_BSHP.dtype), state


def chunked(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    a_H: Tensor,
    b_BSGN: Tensor,
    c_BSGN: Tensor,
    skip_H: Tensor,
    *,
    chunk: int,
    documents_BS: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks of ``chunk`` tokens; the last one may be shorter."""
    batch, length, heads, width = x_BSHP.shape
    groups, size = b_BSGN.shape[2], b_BSGN.shape[3]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    dtype, missing = x_BSHP.dtype, chunks * chunk - length

    def cut(x: Tensor) -> Tensor:
        """[B, S, ...] -> [B, K, Q, ...]; a step of size 0 changes no state."""
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
        return torch.unflatten(padded, 1, (chunks, chunk))

    b_BKLGN, c_BKQGN = cut(b_BSGN), cut(c_BSGN)
    inflow = cut((x_BSHP * dt_BSH[..., None]).to(dtype))
    inflow_BKLGRP = torch.unflatten(inflow, 3, (groups, -1))
    logs_BKQGR = torch.unflatten(cut(dt_BSH * a_H), 3, (groups, -1))
    segments_BKQ = None if documents_BS is None else _segments(documents_BS, chunks, chunk)
    sums_BKGRQ = logs_BKQGR.movedim(2, -1).double().cumsum(-1)

    # Inside each chunk: tokens Q look at the tokens L before them.
    decays = _decays(sums_BKGRQ, None if segments_BKQ is None else segments_BKQ[:, :, None, None])
    scores_BKGQL = torch.einsum("bkqgn,bklgn->bkgql", c_BKQGN, b_BKLGN)
    weights_BKGRQL = (scores_BKGQL[:, :, :, None] * decays).to(dtype)
    inside = torch.einsum("bkgrql,bklgrp->bkqgrp", weights_BKGRQL, inflow_BKLGRP)

    # What each chunk adds to the state by its end, and the state that each one finds.
    left_BKGRQ = (sums_BKGRQ[..., -1:] - sums_BKGRQ).float().exp()
    carried_BKGRQ = sums_BKGRQ.float().exp()
    ends_BK = None
    if segments_BKQ is not None:
        # After each chunk, and before the first one.
        ends_BK = torch.cat((segments_BKQ[:, 0, :1], segments_BKQ[:, :, -1]), dim=1)
        to_end = (segments_BKQ == ends_BK[:, 1:, None])[:, :, None, None]
        from_start = (segments_BKQ == ends_BK[:, :-1, None])[:, :, None, None]
        left_BKGRQ, carried_BKGRQ = left_BKGRQ * to_end, carried_BKGRQ * from_start
    decayed = (inflow_BKLGRP * left_BKGRQ.movedim(-1, 2)[..., None]).to(dtype)
    added = torch.einsum("bklgn,bklgrp->bkgrpn", b_BKLGN, decayed).float()
    start = added.new_zeros(batch, heads, width, size) if state is None else state
    states = torch.cat((torch.unflatten(start, 1, (groups, -1))[:, None], added), dim=1)
    states = _hand_on(states, sums_BKGRQ[..., -1], ends_BK)
    across = torch.einsum("bkqgn,bkgrpn->bkqgrp", c_BKQGN, states[:, :-1].to(dtype))
    across = across * carried_BKGRQ.movedim(-1, 2)[..., None]

    y_BSHP = (inside + across).flatten(3, 4).flatten(1, 2)[:, :length]
    y_BSHP = y_BSHP + skip_H[:, None] * x_BSHP
    return y_BSHP.to(dtype), states[:, -1].flatten(1, 2)


def _hand_on(states: Tensor, logs_BKGR: Tensor, ends_BK: Tensor | None) -> Tensor:
    """From the start and what each chunk adds to the states after each of them, both
    [B, K + 1, G, R, P, N]: chunks look at those before them as tokens do in a chunk."""
    sums = F.pad(logs_BKGR.movedim(1, -1), (1, 0)).cumsum(-1)
    decays = _decays(sums, None if ends_BK is None else ends_BK[:, None, None])
    return torch.einsum("bgrkl,blgrpn->bkgrpn", decays, states)


def _decays(sums: Tensor, segments: Tensor | None) -> Tensor:
    """fp32 [..., Q, L]: what is left at Q of what came in at L, from the running sums of the
    logarithms of decays, fp64 [..., Q]; 0 for later tokens and for other ``segments``."""
    size = sums.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool, device=sums.device).tril()
    if segments is not None:
        seen = seen & (segments[..., :, None] == segments[..., None, :])
    # Masked before exp: behind it, the infinite gradient of what is masked would be NaN.
    between = (sums[..., :, None] - sums[..., None, :]).float()
    return between.masked_fill(~seen, float("-inf")).exp()


def _segments(documents_BS: Tensor, chunks: int, chunk: int) -> Tensor:
    """[B, K, Q]: runs of equal numbers, counted; what fills the last chunk belongs to the last
    run, so that it hands the state on."""
    new_BS = torch.zeros_like(documents_BS)
    new_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    runs_BS = new_BS.cumsum(1)
    missing = chunks * chunk - runs_BS.shape[1]
    runs_BS = torch.cat((runs_BS, runs_BS[:, -1:].expand(-1, missing)), dim=1)
    return torch.unflatten(runs_BS, 1, (chunks, chunk))
