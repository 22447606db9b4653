"""The objects of OpenAI's chat completions: replies, chunks of streams, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mtk.tokenizers import Tokenizer
from serving.openai_objects import envelope, usage
from serving.requests import Delta, GenerationRequest, SequenceOutput, TokenLogprob
from serving.service import Service


class ChatObjects:
    """Implements :class:`serving.sse.Objects`; all chunks of a stream carry the same id."""

    def __init__(self, service: Service, asked: GenerationRequest, *, include_usage: bool) -> None:
        self._asked, self._include_usage = asked, include_usage
        self._tokenizer = service.engine.tokenizer
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        self._envelope = envelope(service.settings, "chatcmpl", kind)
        self._begun: set[int] = set()
        self._tokens = 0

    def whole(self, outputs: Sequence[SequenceOutput]) -> dict[str, Any]:
        produced = sum(len(output.tokens) for output in outputs)
        return {
            **self._envelope,
            "choices": [self._choice(output) for output in outputs],
            "usage": usage(self._asked, produced),
        }

    def _choice(self, output: SequenceOutput) -> dict[str, Any]:
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish,
        }

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The role first, then one chunk for a step that brought something to show."""
        self._tokens += len(delta.tokens)
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._chunk(delta.index, {"role": "assistant", "content": ""})
        if delta.text or delta.logprobs:
            logprobs = self._logprobs(delta.logprobs)
            yield self._chunk(delta.index, {"content": delta.text}, logprobs)
        if delta.finish:
            yield self._chunk(delta.index, {}, finish=delta.finish)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        if self._include_usage:
            counted = usage(self._asked, self._tokens)
            yield {**self._envelope, "choices": [], "usage": counted}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        found = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._envelope, "choices": [found]}

    def _logprobs(self, values: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.sampling.logprobs is None:
            return None
        return {"content": [self._token(value) for value in values]}

    def _token(self, value: TokenLogprob) -> dict[str, Any]:
        top = [_spelled(token, logprob, self._tokenizer) for token, logprob in value.top]
        return {**_spelled(value.token, value.logprob, self._tokenizer), "top_logprobs": top}


def _spelled(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    """bytes: of the token alone, null where they depend on its neighbours."""
    data = tokenizer.token_bytes(token)
    return {
        "token": tokenizer.decode([token]),
        "logprob": logprob,
        "bytes": None if data is None else list(data),
    }
