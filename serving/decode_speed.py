"""How fast a model decodes, through the same steps as the server's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mtk.models.gpt import GPT
from serving.generation import Decoder


@dataclass(frozen=True)
class DecodeFigures:
    """prefill_seconds: until every sequence has its first token. step_seconds: of each step of
    decoding, by the host's clock, in which every sequence gets a token. tokens: what was
    generated, greedily, row by row."""

    prefill_seconds: float
    step_seconds: Sequence[float]
    tokens: Sequence[Sequence[int]]


@torch.inference_mode()
def measure_decode(
    model: GPT, batch: int, prompt_tokens: int, new_tokens: int, *, seed: int = 0
) -> DecodeFigures:
    """Decode ``new_tokens`` (at least 2) for each of ``batch`` random prompts; that of row i has
    seed + i. The host knows every token before the next step, so its clock is the right one."""
    vocab, prompts = model.config.vocab_size or 0, []
    for row in range(batch):
        chance = torch.Generator().manual_seed(seed + row)
        prompts.append(torch.randint(vocab, (prompt_tokens,), generator=chance).tolist())
    decoder = Decoder(model)
    if model.output_weight.is_cuda:
        torch.cuda.synchronize(model.output_weight.device)
    started = time.perf_counter()
    logits = [decoder.prefill(decoder.cache.add_row(), prompt)[0] for prompt in prompts]
    chosen: list[int] = torch.stack(logits).argmax(dim=-1).tolist()
    ends, columns = [time.perf_counter()], [chosen]
    for _ in range(new_tokens - 1):
        chosen = decoder.decode(chosen).argmax(dim=-1).tolist()
        ends.append(time.perf_counter())
        columns.append(chosen)
    steps = [later - earlier for earlier, later in pairwise(ends)]
    return DecodeFigures(ends[0] - started, steps, list(zip(*columns, strict=True)))
