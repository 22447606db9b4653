"""How fast a model decodes, through the same steps as the server's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError
from mtk.models.gpt import GPT
from mtk.tokenizers.null import NullTokenizer
from serving.generation import RunningSequence, Vocabulary
from serving.paged.batch import PagedBatch
from serving.paged.budget import paged_settings
from serving.paged.layers import cache_shape, can_page
from serving.requests import GenerationRequest
from serving.sampling import SamplingParams

# Steps before the clock starts: graphs are captured and kernels compiled.
WARM_UP = 8
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class DecodeFigures:
    """What was measured. prefill_seconds: until every sequence has its first token. step_seconds:
    of each step of decoding, by the host's clock. timed_tokens: what these steps brought, a token
    to every sequence, or more where guesses were right. weight_bytes: read by a step at least once
    (all parameters but an embedding that is only looked up). graphs: captured sizes. blocks: of
    the cache. drafted: guessed tokens that were computed, accepted: of these right. tokens: what
    was generated, row by row."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    step_seconds: Sequence[float]
    timed_tokens: int
    weight_bytes: int
    cache_token_bytes: int
    graphs: int
    blocks: int
    drafted: int
    accepted: int
    tokens: Sequence[Sequence[int]]

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences, over all timed steps."""
        return self.timed_tokens / self.seconds

    @property
    def step_tokens(self) -> float:
        """New tokens of all sequences in one step."""
        return self.timed_tokens / len(self.step_seconds)

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.batch * self.prompt_tokens / self.prefill_seconds

    @property
    def median_step(self) -> float:
        return sorted(self.step_seconds)[len(self.step_seconds) // 2]

    @property
    def bytes_per_second(self) -> float:
        """Weights and cached keys and values that steps had to read at least."""
        seen = self.prompt_tokens + self.new_tokens / 2
        step = self.weight_bytes + self.batch * seen * self.cache_token_bytes
        return step * len(self.step_seconds) / self.seconds


@torch.inference_mode()
def measure_decode(
    model: GPT,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    options: CacheConfig | None = None,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
    period: int | None = None,
) -> DecodeFigures:
    """Decode ``new_tokens`` for each of ``batch`` random prompts, on the paged cache.

    The model's matrices are joined in place, as when it is served. options: as of ``mtk serve``
    (default: its defaults, without the prefix cache and guesses). sampling: how tokens are chosen.
    period: prompts are so many random tokens again and again (default: random to the end). Raises
    ConfigError for a model that blocks do not hold and for too few tokens to time.
    """
    if not can_page(model):
        raise ConfigError("the model keeps states or biases scores; the paged cache cannot hold it")
    if new_tokens <= WARM_UP + 1:
        raise ConfigError(f"{new_tokens} new tokens: give at least {WARM_UP + 2} to be timed")
    options = options or CacheConfig(prefix_caching=False, speculation="off")
    context = prompt_tokens + new_tokens
    vocab = model.config.vocab_size or 0
    vocabulary = Vocabulary(NullTokenizer({"vocab_size": vocab, "eod": 0}), vocab)
    settings = paged_settings(model.eval(), options, rows=batch, context=context)
    if settings.blocks * cache_shape(model).block < batch * context:
        raise ConfigError("the cache does not hold all sequences at once. Lower batch or tokens.")
    running = PagedBatch(model, vocabulary, settings)
    prompts = prompts_of(vocab, batch + 1, prompt_tokens, seed, period)
    sequences = [_sequence(prompt, new_tokens, vocabulary, sampling) for prompt in prompts[:batch]]
    # Prompts are read once before, for what libraries do at first.
    running.add(_sequence(prompts[batch], 1, vocabulary, sampling))
    while running.count:
        running.step()
    for sequence in sequences:
        running.add(sequence)
    _wait(model)
    start = time.perf_counter()
    while any(not sequence.tokens for sequence in sequences):
        running.step()
    prefill = time.perf_counter() - start
    steps, timed_tokens = _timed(running, sequences)
    graphs, cache = running.runner.graphs, running.cache_stats()
    return DecodeFigures(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_seconds=prefill,
        step_seconds=steps,
        timed_tokens=timed_tokens,
        weight_bytes=_weight_bytes(model),
        cache_token_bytes=running.runner.storage.shape.token_bytes,
        graphs=0 if graphs is None else graphs.count,
        blocks=settings.blocks,
        drafted=cache.drafted,
        accepted=cache.accepted,
        tokens=[tuple(sequence.tokens) for sequence in sequences],
    )


def _timed(running: PagedBatch, sequences: Sequence[RunningSequence]) -> tuple[list[float], int]:
    """Seconds of each step while all sequences run, and the tokens of all these steps. Tokens come
    to the host at its pace, so that its clock is the right one."""
    for _ in range(WARM_UP):
        running.step()
    seconds, tokens, before = list[float](), 0, time.perf_counter()
    while all(sequence.finish is None for sequence in sequences):
        tokens += sum(len(delta.tokens) for _, delta in running.step())
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    if not seconds:
        raise ConfigError(
            "the first sequence ended before the last was read. Give more new tokens."
        )
    errors = [sequence.error for sequence in sequences if sequence.error is not None]
    if errors:
        raise errors[0]
    return seconds, tokens


def prompts_of(
    vocab: int, batch: int, length: int, seed: int, period: int | None = None
) -> list[list[int]]:
    """Random token ids, those of row i with seed + i. period: see :func:`measure_decode`."""
    found, size = [], min(length, period or length)
    for row in range(batch):
        chance = torch.Generator().manual_seed(seed + row)
        ids = torch.randint(vocab, (size,), generator=chance).tolist()
        found.append((ids * -(-length // size))[:length])
    return found


def _sequence(
    prompt: Sequence[int], new: int, vocabulary: Vocabulary, sampling: SamplingParams
) -> RunningSequence:
    request = GenerationRequest(prompts=(tuple(prompt),), max_tokens=new, sampling=sampling)
    return RunningSequence(request, 0, vocabulary)


def _weight_bytes(model: GPT) -> int:
    looked_up = 0
    if model.output is not None and model.embedding is not None:
        looked_up = model.embedding.tokens.weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - looked_up


def _wait(model: GPT) -> None:
    if model.output_weight.is_cuda:
        torch.cuda.synchronize(model.output_weight.device)
