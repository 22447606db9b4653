"""Loss on a fixed set of held-out samples, in nats and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mtk.parallel.collectives import all_reduce
from mtk.parallel.ranks import Ranks
from mtk.training.batch import GlobalBatch, LocalBatch
from mtk.training.passes import Passes


def held_out_loss(
    passes: Passes, batches: Iterable[GlobalBatch], ranks: Ranks, token_bytes_V: Tensor | None
) -> dict[str, float]:
    """Exact mean over all valid tokens of ``batches``, the same on every rank.

    An objective of several terms has the mean of each too; tokens and perplexity are those of
    the first. token_bytes_V: bytes of text each id stands for; with it the result has
    ``bits_per_byte``, which does not depend on the tokenizer. Draws no random numbers.
    """
    # nats of each term, weights of each term, bytes of text
    objective = passes.objective
    count = len(objective.names)
    totals = torch.zeros(2 * count + 1, dtype=torch.float64, device=ranks.device)
    lengths = None if token_bytes_V is None else token_bytes_V.to(ranks.device)

    def score(outputs: Any, batch: LocalBatch) -> None:
        losses = objective.losses(outputs, batch)
        if not ranks.tp.first:
            return
        for term, (loss, weight) in enumerate(zip(losses, objective.weights(batch), strict=True)):
            totals[term] += (loss * weight).double().sum()
            totals[count + term] += weight.double().sum()
        if lengths is not None:
            totals[-1] += (lengths[batch.labels_BS] * batch.loss_mask_BS).double().sum()

    for batch in batches:
        passes.evaluate(batch.micro_batches, score)
    *parts, text_bytes = all_reduce(totals, ranks.world, "evaluate.totals").tolist()
    nats, weights = parts[:count], parts[count:]
    means = [n / (w or 1) for n, w in zip(nats, weights, strict=True)]
    result = {"loss": sum(means), "perplexity": math.exp(min(means[0], 700.0))}
    result["tokens"] = weights[0]
    if count > 1:
        result |= dict(zip(objective.names, means, strict=True))
    if text_bytes > 0:
        result["bits_per_byte"] = nats[0] / text_bytes / math.log(2)
    return result
