"""The objects of OpenAI's completions: replies, choices, usage, log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtk.tokenizers import Tokenizer
from serving.requests import GenerationRequest, SequenceOutput, TokenLogprob
from serving.settings import ServerSettings
from serving.text import pieces


@dataclass(frozen=True)
class Completion:
    """A parsed request and how its answer is to look."""

    generation: GenerationRequest
    echo: bool
    include_usage: bool


def envelope(settings: ServerSettings) -> dict[str, Any]:
    """What every reply and every chunk of a stream begins with."""
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": settings.model,
    }


def usage(asked: Completion, produced: int) -> dict[str, int]:
    prompt = sum(len(ids) for ids in asked.generation.prompts)
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
