"""How long a model takes to read prompts and to decode, without server and scheduling.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mtk.models.gpt import GPT
from serving.generation import Decoder

SEED = 1234


@dataclass(frozen=True)
class DecodeSpeed:
    """prefill_seconds: until the first new token of all rows is known. step_seconds: of each
    decode step after that, in all of which every row gets a token. tokens: what was generated,
    greedily, row by row."""

    prefill_seconds: float
    step_seconds: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]


def prompts_of(vocab: int, batch: int, length: int, seed: int = SEED) -> list[list[int]]:
    """Random token ids; every row another prompt."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(vocab, (batch, length), generator=generator).tolist()
    return found


@torch.inference_mode()
def measure_decode(
    model: GPT, batch: int, prompt_tokens: int, new_tokens: int, seed: int = SEED
) -> DecodeSpeed:
    """Read ``batch`` prompts of ``prompt_tokens`` and generate ``new_tokens`` (at least 2) for
    each. Times are those of the host, which knows every token before the next step."""
    prompts = prompts_of(model.config.vocab_size or 0, batch, prompt_tokens, seed)
    decoder = Decoder(model)
    _settle(model)
    started = time.perf_counter()
    logits = []
    for prompt in prompts:
        logits.append(decoder.prefill(decoder.cache.add_row(), prompt)[0])
    chosen: list[int] = torch.stack(logits).argmax(dim=-1).tolist()
    ends, columns = [time.perf_counter()], [chosen]
    for _ in range(new_tokens - 1):
        chosen = decoder.decode(chosen).argmax(dim=-1).tolist()
        ends.append(time.perf_counter())
        columns.append(chosen)
    return speed_of(started, ends, list(zip(*columns, strict=True)))


def speed_of(started: float, ends: Sequence[float], tokens: Sequence[Sequence[int]]) -> DecodeSpeed:
    """From the time at which each column of tokens was known."""
    steps = tuple(later - earlier for earlier, later in pairwise(ends))
    return DecodeSpeed(ends[0] - started, steps, tuple(tuple(row) for row in tokens))


def _settle(model: GPT) -> None:
    """What was launched before is done when the clock starts."""
    device = model.output_weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
