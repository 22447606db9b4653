"""Log-probabilities of given tokens under a model, in batches of a token budget.

What a batch holds does not change what comes out: rows are padded at their end, where a
causal mask keeps the padding from being seen.

Shape suffixes: B batch, S sequence, E hidden size, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mtk.models.gpt import GPT

# Padded tokens of a forward pass, unless the user says otherwise.
BATCH_TOKENS = 16_384
# What rows are padded with: an id that every model has, and no prediction sees.
PAD = 0
# Logits of this many values are in memory at once (fp32: 64 MB).
LOGITS_BUDGET = 2**24


@dataclass(frozen=True)
class Request:
    """One sequence. Predictions of tokens[first:] are scored, each from those before it.

    tokens: ids; an array may be a view, so that overlapping windows share their memory.
    """

    tokens: Sequence[int] | NDArray[np.int64]
    first: int

    @property
    def inputs(self) -> int:
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Scored:
    """log_probs: natural logarithm for each scored token. greedy: whether it was the most
    likely one. predicted: the most likely token in each place."""

    log_probs: list[float]
    greedy: list[bool]
    predicted: list[int]


def batches(requests: Sequence[Request], limit: int, token_budget: int) -> Iterator[list[int]]:
    """Indices grouped by similar length, longest first.

    A group holds at most ``limit`` requests and ``token_budget`` tokens, padding included; a
    request that is longer than the budget is a group of its own.
    """
    group: list[int] = []
    longest = 0
    for index in sorted(range(len(requests)), key=lambda i: -requests[i].inputs):
        longest = longest or max(requests[index].inputs, 1)
        if group and (len(group) >= limit or (len(group) + 1) * longest > token_budget):
            yield group
            group, longest = [], max(requests[index].inputs, 1)
        group.append(index)
    if group:
        yield group


@torch.inference_mode()
def score(model: GPT, requests: Sequence[Request], pad: int) -> list[Scored]:
    """Score one batch. The mask is causal, so what follows a sequence cannot change it."""
    device = model.output_weight.device
    rows = [torch.as_tensor(request.tokens, dtype=torch.int64) for request in requests]
    longest = max(request.inputs for request in requests)
    tokens_BS = torch.full((len(requests), longest), pad, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens_BS[number, : len(row) - 1] = row[:-1]
    states_BSE = model.hidden(tokens_BS.to(device))
    # Only scored places are projected to the vocabulary.
    wanted = [states_BSE[n, r.first - 1 : r.inputs] for n, r in enumerate(requests)]
    targets_N = torch.cat([row[r.first :] for row, r in zip(rows, requests, strict=True)])
    log_probs, best = _targets(model, torch.cat(wanted), targets_N.to(device))
    hits = [b == t for b, t in zip(best, targets_N.tolist(), strict=True)]
    out, place = [], 0
    for request in requests:
        own = slice(place, place + len(request.tokens) - request.first)
        out.append(Scored(log_probs[own], hits[own], best[own]))
        place = own.stop
    return out


def _targets(model: GPT, states_NE: Tensor, targets_N: Tensor) -> tuple[list[float], list[int]]:
    log_probs: list[float] = []
    best: list[int] = []
    rows = max(1, LOGITS_BUDGET // max(model.config.padded_vocab_size, 1))
    for start in range(0, states_NE.shape[0], rows):
        logits_NV = model.logits(states_NE[start : start + rows]).float()
        losses_N = F.cross_entropy(logits_NV, targets_N[start : start + rows], reduction="none")
        log_probs += (-losses_N).tolist()
        best += logits_NV.argmax(dim=-1).tolist()
    return log_probs, best
