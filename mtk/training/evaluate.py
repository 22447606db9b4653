"""Loss on a fixed set of held-out samples, in nats and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.training.batch import GlobalBatch, forward
from mtk.training.loss import token_losses


@torch.no_grad()
def held_out_loss(
    model: GPT, batches: Iterable[GlobalBatch], device: torch.device, token_bytes_V: Tensor | None
) -> dict[str, float]:
    """Exact mean over all valid tokens of ``batches``.

    token_bytes_V: bytes of text each id stands for; with it the result has
    ``bits_per_byte``, which does not depend on the tokenizer. Draws no random numbers.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    text_bytes = torch.zeros((), dtype=torch.float64, device=device)
    lengths = None if token_bytes_V is None else token_bytes_V.to(device)
    for batch in batches:
        for micro in batch.micro_batches:
            labels, mask = micro.labels_BS.to(device), micro.loss_mask_BS.to(device)
            losses = token_losses(forward(model, micro, device), labels)
            total += (losses * mask).double().sum()
            tokens += mask.double().sum()
            if lengths is not None:
                text_bytes += (lengths[labels] * mask).double().sum()
    loss = (total / tokens.clamp(min=1)).item()
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens.item()}
    if text_bytes.item() > 0:
        result["bits_per_byte"] = (total / text_bytes).item() / math.log(2)
    return result
