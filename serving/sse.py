"""Completions as server-sent events: one chunk a step, then ``data: [DONE]``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flask import Response

from mtk.errors import ServingError
from serving.errors import describe, error_body
from serving.openai_objects import Completion, envelope, logprobs_object, usage
from serving.requests import Delta, TokenLogprob
from serving.service import LOOK_EVERY, ClientGoneError, DeltaStream, Service
from serving.text import pieces

# Proxies close silent connections; a comment line every so many seconds keeps them open.
PING_EVERY = 10.0


def stream_completion(service: Service, asked: Completion) -> Response:
    """Begin to generate; refusals raise ServingError before anything is sent."""
    deltas = service.stream(asked.generation)
    chunks = _Chunks(service, asked)
    response = Response(_events(service, chunks, deltas), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    # Closing a generator that never began runs none of its code, hence this hook.
    response.call_on_close(deltas.close)
    return response


def _events(service: Service, chunks: _Chunks, deltas: DeltaStream) -> Iterator[bytes]:
    silent = 0.0
    try:
        for delta in deltas:
            if delta is None:
                silent += LOOK_EVERY
                if silent >= PING_EVERY:
                    silent = 0.0
                    yield b": ping\n\n"
                continue
            silent = 0.0
            for chunk in chunks.of(delta):
                yield event(chunk)
        if chunks.asked.include_usage:
            yield event(chunks.usage())
        yield b"data: [DONE]\n\n"
    except ClientGoneError:
        return
    except ServingError as error:
        yield event(error_body(error))
    except Exception as error:
        service.settings.log(describe(error))
        yield event(error_body(ServingError("internal error", status=500)))


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class _Chunks:
    """The chunks of one stream; all carry the same id."""

    def __init__(self, service: Service, asked: Completion) -> None:
        self.asked = asked
        self._tokenizer = service.engine.tokenizer
        self._envelope = envelope(service.settings)
        self._offsets: dict[int, int] = {}
        self._tokens = 0

    def of(self, delta: Delta) -> Iterator[dict[str, Any]]:
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
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._envelope, "choices": [choice]}

    def usage(self) -> dict[str, Any]:
        return {**self._envelope, "choices": [], "usage": usage(self.asked, self._tokens)}
