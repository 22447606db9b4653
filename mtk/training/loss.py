"""Next-token loss of every token.

It is summed and divided by the number of valid tokens of the whole global batch, so that
neither micro-batches nor ranks change the result. Shape suffixes: B batch, S sequence,
V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy in nats of every token, fp32 [B, S]."""
    losses = F.cross_entropy(
        logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="none"
    )
    return losses.view_as(labels_BS)
