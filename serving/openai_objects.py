"""The objects of OpenAI's completions: replies, chunks of streams, usage, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtk.tokenizers import Tokenizer
from serving.requests import Delta, GenerationRequest, SequenceOutput, TokenLogprob
from serving.service import Service
from serving.settings import ServerSettings
from serving.text import pieces


@dataclass(frozen=True)
class Completion:
    """A parsed request and how its answer is to look."""

    generation: GenerationRequest
    echo: bool
    include_usage: bool


class CompletionObjects:
    """Implements :class:`serving.sse.Objects`; all chunks of a stream carry the same id."""

    def __init__(self, service: Service, asked: Completion) -> None:
        self.asked = asked
        self._tokenizer = service.engine.tokenizer
        self._envelope = envelope(service.settings, "cmpl", "text_completion")
        self._offsets: dict[int, int] = {}
        self._tokens = 0

    def whole(self, outputs: Sequence[SequenceOutput]) -> dict[str, Any]:
        produced = sum(len(output.tokens) for output in outputs)
        return {
            **self._envelope,
            "choices": [choice(output, self.asked, self._tokenizer) for output in outputs],
            "usage": usage(self.asked.generation, produced),
        }

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """One chunk for a step that brought something to show, and the echoed prompt first."""
        self._tokens += len(delta.tokens)
        if delta.index not in self._offsets:
            self._offsets[delta.index] = 0
            if self.asked.echo:
                yield self._echo(delta)
        shown = delta.text or delta.finish or delta.logprobs
        if shown:
            texts = [delta.text] * len(delta.tokens)
            yield self._chunk(delta.index, delta.text, texts, delta.logprobs, delta.finish)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        if self.asked.include_usage:
            counted = usage(self.asked.generation, self._tokens)
            yield {**self._envelope, "choices": [], "usage": counted}

    def _echo(self, delta: Delta) -> dict[str, Any]:
        prompt = self.asked.generation.prompts[delta.index // self.asked.generation.samples]
        texts = pieces(self._tokenizer, prompt)
        values = (None, *delta.prompt_logprobs)
        return self._chunk(delta.index, "".join(texts), texts, values, None)

    def _chunk(
        self,
        index: int,
        text: str,
        texts: list[str],
        values: tuple[TokenLogprob | None, ...],
        finish: str | None,
    ) -> dict[str, Any]:
        logprobs = None
        if self.asked.generation.sampling.logprobs is not None:
            logprobs = logprobs_object(texts, values, self._tokenizer, self._offsets[index])
        self._offsets[index] += len(text)
        found = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._envelope, "choices": [found]}


def envelope(settings: ServerSettings, prefix: str, kind: str) -> dict[str, Any]:
    """What every reply and every chunk of a stream begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": settings.model,
    }


def usage(asked: GenerationRequest, produced: int) -> dict[str, int]:
    prompt = sum(len(ids) for ids in asked.prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": produced,
        "total_tokens": prompt + produced,
    }


def choice(output: SequenceOutput, asked: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    texts = list(output.steps)
    values: list[TokenLogprob | None] = list(output.logprobs)
    before = ""
    if asked.echo:
        prompt = pieces(tokenizer, output.prompt)
        before = "".join(prompt)
        texts = [*prompt, *texts]
        values = [None, *output.prompt_logprobs, *values]
    wanted = asked.generation.sampling.logprobs is not None
    return {
        "index": output.index,
        "text": before + output.text,
        "logprobs": logprobs_object(texts, values, tokenizer) if wanted else None,
        "finish_reason": output.finish,
    }


def logprobs_object(
    texts: Sequence[str],
    values: Sequence[TokenLogprob | None],
    tokenizer: Tokenizer,
    offset: int = 0,
) -> dict[str, Any]:
    """OpenAI's parallel lists; the first token of a prompt has null. offset: characters
    that came before."""
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": list(texts),
        "token_logprobs": [None if value is None else value.logprob for value in values],
        "top_logprobs": [None if value is None else _top(value, tokenizer) for value in values],
        "text_offset": offsets,
    }


def _top(value: TokenLogprob, tokenizer: Tokenizer) -> dict[str, float]:
    """Alternatives by their text; of tokens with the same text the likeliest counts."""
    found: dict[str, float] = {}
    for token, logprob in (*value.top, (value.token, value.logprob)):
        found.setdefault(tokenizer.decode([token]), logprob)
    return found
