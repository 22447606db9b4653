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

# Likeliest tokens among which a nucleus is looked for first: on a host, sorting a vocabulary takes
# longer than all else that chooses a token.
CANDIDATES = 2048


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
    # On a GPU nobody may wait to hear whether candidates were enough: there all are sorted.
    if scores_DV.is_cuda or scores_DV.shape[-1] <= 2 * CANDIDATES:
        return _nucleus(scores_DV, p_D1)
    kept_DV, enough_D = _nucleus_of_candidates(scores_DV, p_D1)
    short_S = (~enough_D).nonzero()[:, 0]
    if len(short_S):
        kept_DV[short_S] = _nucleus(scores_DV[short_S], p_D1[short_S])
    return kept_DV


def _nucleus(scores_DV: Tensor, p_D1: Tensor) -> Tensor:
    """The likeliest tokens up to the first that takes their sum over p, others -inf; of equal
    ones the first."""
    sorted_DV, order_DV = scores_DV.sort(dim=-1, descending=True, stable=True)
    drop_DV = _over(sorted_DV.softmax(dim=-1), p_D1)
    return scores_DV.masked_fill(torch.zeros_like(drop_DV).scatter(1, order_DV, drop_DV), -math.inf)


def _nucleus_of_candidates(scores_DV: Tensor, p_D1: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the ``CANDIDATES`` likeliest only, and of which rows this is all of it, bool
    [D]: those whose last kept token is likelier than the last candidate, as of equal ones an
    earlier may have been left out."""
    best_DC, order_DC = scores_DV.topk(CANDIDATES, dim=-1)
    # Those of one value in the order of the vocabulary.
    order_DC = order_DC.sort(dim=-1).values
    sorted_DC, again_DC = scores_DV.gather(1, order_DC).sort(dim=-1, descending=True, stable=True)
    order_DC = order_DC.gather(1, again_DC)
    total_D1 = scores_DV.logsumexp(dim=-1, keepdim=True)
    drop_DC = _over((sorted_DC - total_D1).exp(), p_D1)
    kept_DC = sorted_DC.masked_fill(drop_DC, -math.inf)
    last_D = sorted_DC.masked_fill(drop_DC, math.inf).amin(dim=-1)
    kept_DV = torch.full_like(scores_DV, -math.inf).scatter_(1, order_DC, kept_DC)
    return kept_DV, last_D > best_DC[:, -1]


def _over(chances_DV: Tensor, p_D1: Tensor) -> Tensor:
    """Which of sorted tokens go: those before which the sum was over p already."""
    drop_DV = torch.zeros_like(chances_DV, dtype=torch.bool)
    drop_DV[:, 1:] = chances_DV.cumsum(dim=-1)[:, :-1] > p_D1
    return drop_DV


def index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers on ``device``, on their way there."""
    return send(torch.tensor(rows, dtype=torch.int64), device)


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x if len(rows) == x.shape[0] else x.index_select(0, index(rows, x.device))


def _put(x: Tensor, rows: Sequence[int], part: Tensor) -> Tensor:
    if len(rows) == x.shape[0]:
        return part
    return x.index_copy(0, index(rows, x.device), part)
