"""How fast a model decodes, through the same steps as the server's."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError
from mtk.models.gpt import GPT
from mtk.tokenizers.null import NullTokenizer
from serving.decode_bytes import cache_token_bytes, read_weights, state_bytes
from serving.encoder_prompt import EncoderPrompt, has_encoder
from serving.generation import Batch, RunningSequence, SequenceBatch, Vocabulary, decoder_for
from serving.paged.batch import PagedBatch
from serving.paged.budget import paged_settings
from serving.paged.layers import cache_shape, can_page
from serving.requests import GenerationRequest
from serving.sampling import SamplingParams

# Steps before the clock starts: graphs are captured and kernels compiled.
WARM_UP = 8
# "dense": a row for each sequence; with Mamba layers states in it, of a T5 the prompt's keys and
# values beside the decoder's own.
CacheKind = Literal["paged", "dense"]
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class DecodeFigures:
    """What was measured. prefill_seconds: until every sequence has its first token. step_seconds:
    of each step of decoding, by the host's clock. timed_tokens: what these steps brought, a token
    to every sequence, or more where guesses were right. weight_bytes: read by a step at least once
    (without embeddings that are only looked up, and what only prompts go through). cache: what
    kept the sequences; blocks, graphs: of a paged one how many, and captured sizes.
    cache_token_bytes: keys and values of a token; state_bytes: of a sequence besides, however
    long. drafted: guessed tokens that were computed, accepted: of these right. tokens: what was
    generated, row by row."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    step_seconds: Sequence[float]
    timed_tokens: int
    weight_bytes: int
    cache: CacheKind
    cache_token_bytes: int
    state_bytes: int
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
        """Weights, cached keys and values, and states that steps had to read at least."""
        seen = self.prompt_tokens + self.new_tokens / 2
        row = seen * self.cache_token_bytes + self.state_bytes
        step = self.weight_bytes + self.batch * row
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
    start: int | None = None,
) -> DecodeFigures:
    """Decode ``new_tokens`` for each of ``batch`` random prompts, on the cache that the model is
    served with: blocks, or dense rows for models that these do not hold (of a T5 the prompts go
    through the encoder).

    The matrices of a model on blocks are joined in place, as when it is served. options: as of
    ``mtk serve`` (default: its defaults, without the prefix cache and guesses). sampling: how
    tokens are chosen. period: prompts are so many random tokens again and again (default: random
    to the end). start: what a T5's decoder begins with (default: its own, else 0). Raises
    ConfigError for options that the model cannot have and for too few tokens to time.
    """
    if new_tokens <= WARM_UP + 1:
        raise ConfigError(f"{new_tokens} new tokens: give at least {WARM_UP + 2} to be timed")
    options = options or CacheConfig(prefix_caching=False, speculation="off")
    context = prompt_tokens + new_tokens
    vocab = model.config.vocab_size or 0
    vocabulary = Vocabulary(NullTokenizer({"vocab_size": vocab, "eod": 0}), vocab)
    encoder = _encoder(model, start)
    running = _cached(model.eval(), options, vocabulary, encoder, batch, context)
    prompts = prompts_of(vocab, batch + 1, prompt_tokens, seed, period)
    sequences = [_sequence(prompt, new_tokens, vocabulary, sampling) for prompt in prompts[:batch]]
    # Prompts are read once before, for what libraries do at first.
    running.add(_sequence(prompts[batch], 1, vocabulary, sampling))
    while running.count:
        running.step()
    _wait(model)
    began = time.perf_counter()
    for sequence in sequences:
        running.add(sequence)
    while any(not sequence.tokens for sequence in sequences):
        running.step()
    prefill = time.perf_counter() - began
    steps, timed_tokens = _timed(running, sequences)
    paged = running if isinstance(running, PagedBatch) else None
    cache = running.cache_stats()
    graphs = None if paged is None else paged.runner.graphs
    return DecodeFigures(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_seconds=prefill,
        step_seconds=steps,
        timed_tokens=timed_tokens,
        weight_bytes=read_weights(model),
        cache="dense" if paged is None else "paged",
        cache_token_bytes=cache_token_bytes(model),
        state_bytes=state_bytes(model),
        graphs=0 if graphs is None else graphs.count,
        blocks=0 if paged is None else paged.pool.capacity,
        drafted=cache.drafted,
        accepted=cache.accepted,
        tokens=[tuple(sequence.tokens) for sequence in sequences],
    )


def _encoder(model: GPT, start: int | None) -> EncoderPrompt | None:
    if not has_encoder(model.config):
        return None
    own = model.config.decoder_start_token_id
    return EncoderPrompt(next(s for s in (start, own, 0) if s is not None), sys.maxsize)


def _cached(
    model: GPT,
    options: CacheConfig,
    vocabulary: Vocabulary,
    encoder: EncoderPrompt | None,
    batch: int,
    context: int,
) -> SequenceBatch:
    if not can_page(model) or options.kv_cache == "dense":
        if options.kv_cache == "paged":
            raise ConfigError(
                "the model has states, an encoder or biases on scores; the paged cache cannot "
                "hold it"
            )
        return Batch(decoder_for(model, encoder))
    settings = paged_settings(model, options, rows=batch, context=context)
    if settings.blocks * cache_shape(model).block < batch * context:
        raise ConfigError("the cache does not hold all sequences at once. Lower batch or tokens.")
    return PagedBatch(model, vocabulary, settings)


def _timed(running: SequenceBatch, sequences: Sequence[RunningSequence]) -> tuple[list[float], int]:
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


def _wait(model: GPT) -> None:
    if model.output_weight.is_cuda:
        torch.cuda.synchronize(model.output_weight.device)
