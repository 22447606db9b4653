"""An even assignment of a sequence's tokens to experts (Clark et al. 2022, section 3.1).

Sinkhorn's algorithm scales the rows and columns of exp(logits) until every token has the same
share and every expert too. Only the columns' factors matter for which experts a token prefers:
one number for each expert, added to logits. The iterations are a fixed number, so that the
host waits for nothing (Megatron's loop asks the device after each), and in logarithms, so that
no expert is too bad to come back.

Shape suffixes: B sequences, S tokens of a sequence, X experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ITERATIONS = 16


@torch.no_grad()
def sinkhorn(logits_BSX: Tensor) -> Tensor:
    """fp32 [B, X]: what to add to each expert's logits so that it is chosen evenly."""
    tokens, experts = logits_BSX.shape[1:]
    shift_BX = torch.zeros_like(logits_BSX[:, 0])
    share = math.log(max(tokens, 1) / experts)
    for _ in range(ITERATIONS):
        shares_BSX = (logits_BSX + shift_BX[:, None]).log_softmax(-1)
        shift_BX = shift_BX + share - shares_BSX.logsumexp(1)
    return shift_BX
