"""Loss on a fixed set of held-out samples, in nats and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mtk.parallel.collectives import all_reduce
from mtk.parallel.ranks import Ranks
from mtk.training.batch import GlobalBatch
from mtk.training.passes import Passes


def held_out_loss(
    passes: Passes, batches: Iterable[GlobalBatch], ranks: Ranks, token_bytes_V: Tensor | None
) -> dict[str, float]:
    """Exact mean over all valid tokens of ``batches``, the same on every rank.

    token_bytes_V: bytes of text each id stands for; with it the result has
    ``bits_per_byte``, which does not depend on the tokenizer. Draws no random numbers.
    """
    # nats, tokens, bytes of text
    totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    lengths = None if token_bytes_V is None else token_bytes_V.to(ranks.device)

    def score(losses_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> None:
        if not ranks.tp.first:
            return
        totals[0] += (losses_BS * mask_BS).double().sum()
        totals[1] += mask_BS.double().sum()
        if lengths is not None:
            totals[2] += (lengths[labels_BS] * mask_BS).double().sum()

    for batch in batches:
        passes.evaluate(batch.micro_batches, score)
    nats, tokens, text_bytes = all_reduce(totals, ranks.world, "evaluate.totals").tolist()
    loss = nats / max(tokens, 1)
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
    if text_bytes > 0:
        result["bits_per_byte"] = nats / text_bytes / math.log(2)
    return result
