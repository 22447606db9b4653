"""Log-probabilities of given tokens under a model, in batches of a token budget.

Shape suffixes: B batch, S sequence, E hidden size, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.models.gpt import GPT

# Logits of this many values are in memory at once (fp32: 64 MB).
LOGITS_BUDGET = 2**24


@dataclass(frozen=True)
class Request:
    """One sequence. Predictions of tokens[first:] are scored, each from those before it."""

    tokens: Sequence[int]
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

    A group holds at most ``limit`` requests and ``token_budget`` tokens, padding included.
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
    longest = max(request.inputs for request in requests)
    tokens_BS = torch.full((len(requests), longest), pad, dtype=torch.int64)
    for row, request in enumerate(requests):
        tokens_BS[row, : request.inputs] = torch.tensor(request.tokens[:-1])
    states_BSE = model.hidden(tokens_BS.to(device))
    # Only scored places are projected to the vocabulary.
    wanted = [
        states_BSE[row, request.first - 1 : request.inputs] for row, request in enumerate(requests)
    ]
    targets = [t for request in requests for t in request.tokens[request.first :]]
    log_probs, best = _targets(model, torch.cat(wanted), torch.tensor(targets, device=device))
    out, place = [], 0
    for request in requests:
        count = len(request.tokens) - request.first
        own = slice(place, place + count)
        hits = [b == t for b, t in zip(best[own], targets[own], strict=True)]
        out.append(Scored(log_probs[own], hits, best[own]))
        place += count
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
