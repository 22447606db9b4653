"""Batched generation with a cache: prefill a prompt alone, decode all rows together.

Prompts are never padded: each is prefilled in a row of its own, and in a decode step every
row has its own position and looks only at its own tokens. A row's logits are therefore
those of the row generated alone.

Shape suffixes: B rows, S new tokens, T all tokens, V vocabulary, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mtk.errors import ServingError
from mtk.models.gpt import GPT
from mtk.models.t5 import T5
from mtk.tokenizers import Tokenizer
from serving.decoding import SequenceDecoder
from serving.encoder_decoder import EncoderDecoder
from serving.encoder_prompt import EncoderPrompt, unlimited_prompt
from serving.engine import CacheStats
from serving.kv_cache import KVCache
from serving.requests import (
    Delta,
    FinishReason,
    GenerationRequest,
    SequenceOutput,
    TokenLogprob,
)
from serving.sampling import Choice, Sampler
from serving.text import LineStop, StopStrings, TextStream

# Positions whose logits are held at once when a whole prompt is scored.
SCORED_AT_ONCE = 256


class Decoder:
    """Implements :class:`serving.decoding.SequenceDecoder` for models that continue prompts."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.cache = KVCache(len(model.layers), model.stateful_layers)
        self._device = model.output_weight.device

    def prefill(
        self, row: int, prompt: Sequence[int], *, score_top: int | None = None
    ) -> tuple[Tensor, list[TokenLogprob]]:
        """Read a prompt into an empty row.

        Returns the logits [V] of the next token and, if ``score_top`` is a number, the
        log-probabilities of prompt tokens 1.. with so many alternatives.
        """
        tokens_BS = torch.tensor([prompt], device=self._device)
        views = self.cache.prefill_views(row)
        hidden_BSE = self.model.hidden(tokens_BS, caches=views)
        self.cache.lengths[row] += len(prompt)
        scored: list[TokenLogprob] = []
        if score_top is not None:
            for start in range(0, len(prompt) - 1, SCORED_AT_ONCE):
                end = min(start + SCORED_AT_ONCE, len(prompt) - 1)
                logits_SV = self.model.logits(hidden_BSE[0, start:end])
                scored += logprobs_of(logits_SV, prompt[start + 1 : end + 1], score_top)
        return self.model.logits(hidden_BSE[0, -1]), scored

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; the logits [B, V] of the next ones."""
        positions_B = torch.tensor(self.cache.lengths, device=self._device)
        tokens_BS = torch.tensor(tokens, device=self._device)[:, None]
        seen_T = torch.arange(max(self.cache.lengths) + 1, device=self._device)
        mask_BT = seen_T[None, :] <= positions_B[:, None]
        logits_BSV = self.model(
            tokens_BS,
            positions_B[:, None],
            mask=mask_BT[:, None, None, :],
            caches=self.cache.decode_views(positions_B),
        )
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        return logits_BSV[:, 0]  # type: ignore[no-any-return]


def decoder_for(model: GPT, encoder: EncoderPrompt | None) -> SequenceDecoder:
    """The one place that chooses by kind of model. encoder: None for one without."""
    if encoder is None:
        return Decoder(model)
    assert isinstance(model, T5)
    return EncoderDecoder(model, encoder.start)


def logprobs_of(logits_SV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-softmax of raw logits at ``tokens``, each with its ``top`` likeliest alternatives."""
    values_SV = logits_SV.float().log_softmax(dim=-1)
    index_S1 = torch.tensor(tokens, device=values_SV.device)[:, None]
    chosen = values_SV.gather(1, index_S1)[:, 0].tolist()
    if not top:
        return [TokenLogprob(*pair) for pair in zip(tokens, chosen, strict=True)]
    best = values_SV.topk(min(top, values_SV.shape[-1]), dim=-1)
    rows = zip(tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(t, c, tuple(zip(ids, v, strict=True))) for t, c, ids, v in rows]


def not_finite() -> ServingError:
    return ServingError("the model computed NaN or infinite logits", status=500)


class Vocabulary:
    """What generation needs to know about tokens' texts. size: ids that may be drawn. continues:
    whether new text goes on with the prompt's (not where an encoder reads it)."""

    def __init__(self, tokenizer: Tokenizer, model_vocab: int, *, continues: bool = True) -> None:
        self.tokenizer = tokenizer
        self._continues = continues
        self.size = min(tokenizer.vocab_size, model_vocab)
        self._newlines: Tensor | None = None

    def before(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """Ids whose text stands before the first new token's."""
        return prompt if self._continues else ()

    def newlines(self, device: torch.device) -> Tensor:
        """Ids of all tokens whose text begins with a newline; found at first use."""
        if self._newlines is None:
            ids = [i for i in range(self.size) if self.tokenizer.decode([i]).startswith("\n")]
            self._newlines = torch.tensor(ids, dtype=torch.int64, device=device)
        return self._newlines


class RunningSequence:
    """One continuation of one prompt: chooses tokens, makes text, knows when it is done."""

    def __init__(self, request: GenerationRequest, index: int, vocabulary: Vocabulary) -> None:
        self.request = request
        self.index = index
        self.prompt = request.prompts[index // request.samples]
        self.finish: FinishReason | None = None
        self.error: ServingError | None = None
        self._vocabulary = vocabulary
        self._sampler = Sampler(request.sampling, index % request.samples)
        self._guide = request.guide.begin() if request.guide is not None else None
        before = vocabulary.before(self.prompt)
        self._text = TextStream(vocabulary.tokenizer, before)
        self._stops = StopStrings(request.stop.strings)
        self._line: LineStop | None = None
        self._last_text = ""
        if request.stop.line or not request.newline_after_colon:
            self._last_text = vocabulary.tokenizer.decode(before[-4:])
        if request.stop.line:
            double = request.stop.line == "double_eol"
            self._line = LineStop(double=double, before=self._last_text)
        # Whether each next token is simply the likeliest one, and nothing else is asked of it.
        sampling = request.sampling
        self.plain = sampling.greedy and sampling.logprobs is None and request.max_tokens > 0
        self.plain = self.plain and not self.waits_for_last
        self.tokens: list[int] = []
        self._steps: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []

    @property
    def score_top(self) -> int | None:
        """What a decoder's ``prefill`` is to score of the prompt."""
        return (self.request.sampling.logprobs or 0) if self.request.prompt_logprobs else None

    def begin(self, logits_V: Tensor, scored: list[TokenLogprob]) -> Delta:
        """The step after the prompt was read; a request of no new tokens ends with it.

        scored: log-probabilities of the prompt's tokens, if they were asked for.
        """
        if not self.scored_well(scored):
            return self._broken()
        if self.request.max_tokens > 0:
            return self.advance(logits_V)
        return self.end_scored(finite=bool(torch.isfinite(logits_V).all()))

    def scored_well(self, scored: list[TokenLogprob]) -> bool:
        """Take the log-probabilities of the prompt's tokens; whether all are numbers."""
        self.prompt_logprobs = scored
        return all(math.isfinite(item.logprob) for item in scored)

    def end_scored(self, *, finite: bool) -> Delta:
        """The only step of a request of no new tokens. finite: whether its logits are."""
        if not finite:
            return self._broken()
        self.finish = "length"
        return Delta(self.index, (), "", (), self.finish)

    def advance(self, logits_V: Tensor) -> Delta:
        """Choose the next token from raw logits and apply the stop rules.

        Logits with NaN or infinity set ``error`` instead: the weights or their precision
        are broken, and nothing drawn from them would mean anything.
        """
        if not torch.isfinite(logits_V).all():
            return self._broken()
        token = self._sampler.choose(self._allowed(logits_V))
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.request.sampling.logprobs is not None:
            top = self.request.sampling.logprobs
            logprobs = tuple(logprobs_of(logits_V[None], [token], top))
        return self.take(token, logprobs)

    def next_choice(self) -> Choice:
        """How the token after the last one asked for is to be chosen, by whoever has its logits."""
        return self._sampler.next()

    @property
    def forbids_newline(self) -> bool:
        """Whether the token after the last one taken must not begin with a newline."""
        return not self.request.newline_after_colon and self._last_text.endswith(":")

    @property
    def guided(self) -> bool:
        """Whether :meth:`guide` changes its logits."""
        return self._guide is not None

    def guide(self, logits_V: Tensor) -> Tensor:
        """Logits after the request's guide, which has seen all tokens taken."""
        return logits_V if self._guide is None else self._guide.apply(logits_V)

    @property
    def waits_for_last(self) -> bool:
        """Whether a choice depends on the token before it, so that this must be taken first."""
        return self.guided or not self.request.newline_after_colon

    def take(self, token: int | None, logprobs: tuple[TokenLogprob, ...] = ()) -> Delta:
        """Apply the stop rules to a token that was chosen; None: of logits that are not finite."""
        if token is None:
            return self._broken()
        self.tokens.append(token)
        if self._guide is not None:
            self._guide.accept(token)
        text = self._accept(token)
        self._steps.append(text)
        self._logprobs += logprobs
        return Delta(self.index, (token,), text, logprobs, self.finish)

    def _broken(self) -> Delta:
        self.error = not_finite()
        return Delta(self.index, (), "")

    def _accept(self, token: int) -> str:
        if token in self.request.stop.token_ids:
            self.finish = "stop"
            ready, _ = self._stops.push(self._text.flush())
            return ready + self._stops.flush()
        new = self._text.push(token)
        last = len(self.tokens) >= self.request.max_tokens
        if last:
            new += self._text.flush()
        self._last_text = new or self._last_text
        if self._line is not None and self._line.push(new):
            self.finish = "stop"
        ready, stopped = self._stops.push(new)
        if stopped:
            self.finish = "stop"
        elif last and self.finish is None:
            self.finish = "length"
        if self.finish is not None and not stopped:
            ready += self._stops.flush()
        return ready

    def _allowed(self, logits_V: Tensor) -> Tensor:
        if logits_V.shape[-1] > self._vocabulary.size:
            logits_V = logits_V[: self._vocabulary.size]
        if self.forbids_newline:
            newlines = self._vocabulary.newlines(logits_V.device)
            logits_V = logits_V.index_fill(0, newlines, float("-inf"))
        return self.guide(logits_V)

    def output(self) -> SequenceOutput:
        if self.finish is None:
            raise ValueError("the sequence is still running")
        return SequenceOutput(
            index=self.index,
            prompt=self.prompt,
            tokens=tuple(self.tokens),
            text="".join(self._steps),
            steps=tuple(self._steps),
            finish=self.finish,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
        )


class SequenceBatch(Protocol):
    """Sequences that are decoded together, whatever the cache. steady: taking many in at once
    does not hold up those that run."""

    steady: bool

    @property
    def count(self) -> int: ...
    def add(self, sequence: RunningSequence) -> Delta | None:
        """Take a sequence in; its first step, unless that comes with those of :meth:`step`."""

    def step(self) -> list[tuple[RunningSequence, Delta]]:
        """Go on; steps that were made, at most a few for each sequence."""

    def remove(self, unwanted: Callable[[RunningSequence], bool]) -> None: ...
    def clear(self) -> None: ...
    def cache_stats(self) -> CacheStats: ...


class Batch:
    """Sequences that are decoded together on dense caches; rows come and go between steps."""

    # Each prompt is read alone, and whole.
    steady = False

    def __init__(self, decoder: SequenceDecoder) -> None:
        self.decoder = decoder
        self.running: list[RunningSequence] = []

    def add(self, sequence: RunningSequence) -> Delta:
        """Prefill the sequence's prompt and choose its first token."""
        row = self.decoder.cache.add_row()
        self.running.append(sequence)
        logits_V, scored = self.decoder.prefill(row, sequence.prompt, score_top=sequence.score_top)
        delta = sequence.begin(logits_V, scored)
        self.remove(_ended)
        return replace(delta, prompt_logprobs=tuple(scored))

    def step(self) -> list[tuple[RunningSequence, Delta]]:
        """One token for every running sequence."""
        if not self.running:
            return []
        logits_BV = self.decoder.decode([sequence.tokens[-1] for sequence in self.running])
        pairs = zip(self.running, logits_BV, strict=True)
        deltas = [(sequence, sequence.advance(logits_V)) for sequence, logits_V in pairs]
        self.remove(_ended)
        return deltas

    @property
    def count(self) -> int:
        return len(self.running)

    def cache_stats(self) -> CacheStats:
        return CacheStats(self.decoder.cache.tokens)

    def clear(self) -> None:
        self.running.clear()

    def remove(self, unwanted: Callable[[RunningSequence], bool]) -> None:
        """Free the rows of all ``unwanted`` sequences."""
        # From the end, so that the row that moves into a gap has been looked at already.
        for row in reversed(range(len(self.running))):
            if unwanted(self.running[row]):
                moved = self.decoder.cache.free_row(row)
                self.running[row] = self.running[moved]
                self.running.pop()


def _ended(sequence: RunningSequence) -> bool:
    return sequence.finish is not None or sequence.error is not None


@torch.inference_mode()
def generate(
    model: GPT, tokenizer: Tokenizer, request: GenerationRequest, *, max_rows: int = 8
) -> list[SequenceOutput]:
    """All sequences of one request without an engine, at most ``max_rows`` at a time.

    Raises ServingError if the model computes NaN.
    """
    encoder = unlimited_prompt(model.config, tokenizer)
    size = model.config.vocab_size or tokenizer.vocab_size
    vocabulary = Vocabulary(tokenizer, size, continues=encoder is None)
    sequences = [RunningSequence(request, i, vocabulary) for i in range(request.sequences)]
    batch, waiting = Batch(decoder_for(model, encoder)), list(reversed(sequences))
    while waiting or batch.running:
        while waiting and len(batch.running) < max_rows:
            batch.add(waiting.pop())
        batch.step()
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return [sequence.output() for sequence in sequences]
