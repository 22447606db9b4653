"""The next tokens of many rows at once, on the device: what :func:`serving.sampling.choose` picks
for each row alone.

The random numbers are the rows' own, drawn on the host; all else is arithmetic in double.

Shape suffixes: B rows, D rows that draw, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtk.kernels.transfer import send
from serving.sampling import Choice


def draw(logits_DV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """int64 [D]: tokens of rows that all have a temperature. Of logits with NaN any token."""
    device, size = logits_DV.device, logits_DV.shape[-1]
    rows = [(c.temperature, float(c.top_k), c.top_p, c.uniform) for c in choices]
    temperature, _, _, uniform = send(torch.tensor(rows, dtype=torch.float64), device).unbind(1)
    scores_DV = logits_DV.double() - logits_DV.amax(dim=-1, keepdim=True)
    scores_DV /= temperature[:, None]
    limited = [index for index, choice in enumerate(choices) if 0 < choice.top_k < size]
    if limited:
        part = _rows(scores_DV, limited)
        scores_DV = _put(scores_DV, limited, _top_k(part, [choices[i].top_k for i in limited]))
    limited = [index for index, choice in enumerate(choices) if choice.top_p < 1]
    if limited:
        part = _rows(scores_DV, limited)
        scores_DV = _put(scores_DV, limited, _top_p(part, [choices[i].top_p for i in limited]))
    cumulative_DV = scores_DV.softmax(dim=-1).cumsum(dim=-1)
    target_D1 = uniform[:, None] * cumulative_DV[:, -1:]
    found_D = torch.searchsorted(cumulative_DV, target_D1, right=True)[:, 0]
    # Of NaN the search runs past the end; the token is read as input before anybody looks.
    return found_D.clamp(max=size - 1)


def _top_k(scores_DV: Tensor, ks: Sequence[int]) -> Tensor:
    best = scores_DV.topk(max(ks), dim=-1).values
    last_D1 = send(torch.tensor(ks), scores_DV.device)[:, None] - 1
    return scores_DV.masked_fill(scores_DV < best.gather(1, last_D1), -math.inf)


def _top_p(scores_DV: Tensor, ps: Sequence[float]) -> Tensor:
    p_D1 = send(torch.tensor(ps, dtype=torch.float64), scores_DV.device)[:, None]
    sorted_DV, order_DV = scores_DV.sort(dim=-1, descending=True, stable=True)
    sums_DV = sorted_DV.softmax(dim=-1).cumsum(dim=-1)
    drop_DV = torch.zeros_like(sums_DV, dtype=torch.bool)
    drop_DV[:, 1:] = sums_DV[:, :-1] > p_D1
    return scores_DV.masked_fill(torch.zeros_like(drop_DV).scatter(1, order_DV, drop_DV), -math.inf)


def index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers on ``device``, on their way there."""
    return send(torch.tensor(rows, dtype=torch.int64), device)


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x if len(rows) == x.shape[0] else x.index_select(0, index(rows, x.device))


def _put(x: Tensor, rows: Sequence[int], part: Tensor) -> Tensor:
    if len(rows) == x.shape[0]:
        return part
    return x.index_copy(0, index(rows, x.device), part)
