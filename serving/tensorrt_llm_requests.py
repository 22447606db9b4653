"""Requests as TensorRT-LLM takes them, and its answers as the server understands them.

Names of fields are those of ``SamplingParams`` and ``CompletionOutput`` in tensorrt_llm 1.x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtk.errors import ServingError
from serving.generation import RunningSequence, logprobs_of, not_finite
from serving.requests import Delta, GenerationRequest, TokenLogprob
from serving.sampling import SamplingParams

# An odd number near 2^63 / golden ratio keeps the seeds of samples far apart.
STRIDE = 5_700_357_409_661_599_291


def refuse_unsupported(request: GenerationRequest) -> None:
    """Raises ServingError (400) for what this engine would have to pass over in silence."""
    refused = {
        "beam_width": request.beam is not None,
        "prevent_newline_after_colon": not request.newline_after_colon,
        "top_p_decay": request.sampling.top_p_decay > 0,
        # Logits are not ours to change here.
        "response_format": request.guide is not None,
    }
    for param, asked in refused.items():
        if asked:
            text = f"{param} is not available with --engine tensorrt-llm; --engine torch has it"
            raise ServingError(text, param=param)


def sampling_fields(
    request: GenerationRequest, sample: int, seed: int, end: int | None
) -> dict[str, Any]:
    """Arguments of ``SamplingParams`` for one sequence. seed: of the request. end: the id that
    ends documents."""
    stops = request.stop.token_ids
    first = end if end in stops else None
    return {
        # A prompt that is only scored still needs one token; it is not shown.
        "max_tokens": max(1, request.max_tokens),
        # Without an id of its own the package asks for its tokenizer, which there is none of.
        "end_id": -1 if first is None else first,
        "stop_token_ids": sorted(stops - {first}) or None,
        "include_stop_str_in_output": True,
        "ignore_eos": first is None,
        "detokenize": False,
        "add_special_tokens": False,
        "return_context_logits": request.prompt_logprobs,
        # 0 would be none at all there; what is not wanted is dropped on the way back.
        "logprobs": _at_least_one(request.sampling.logprobs),
        "seed": (seed + sample * STRIDE) % 2**63,
        **_choice(request.sampling),
    }


def _at_least_one(logprobs: int | None) -> int | None:
    return None if logprobs is None else max(1, logprobs)


def _choice(sampling: SamplingParams) -> dict[str, Any]:
    """Both top_k and top_p are always said: with neither the package is greedy."""
    if sampling.greedy:
        return {"top_k": 1}
    top_p = sampling.top_p if 0 < sampling.top_p < 1 else 1.0
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": top_p}


class RemoteSequence(RunningSequence):
    """A sequence whose tokens are chosen elsewhere: text and stop rules are mtk's own, so that
    answers read the same whatever engine made them."""

    def deltas(self, result: Any) -> Iterator[Delta]:
        """What is new in a ``RequestOutput``; nothing after the sequence's own end.

        Raises ServingError if the package gave up, or left out what was asked for.
        """
        output = result.outputs[0]
        scored = self._score(result) if not self.tokens else []
        if self.request.max_tokens == 0:
            if result.finished:
                self.finish = "length"
                yield Delta(self.index, (), "", (), self.finish, tuple(scored))
            return
        while self.finish is None and len(self.tokens) < len(output.token_ids):
            at = len(self.tokens)
            token = int(output.token_ids[at])
            delta = self.take(token, self._logprobs_at(output, at, token))
            yield replace(delta, prompt_logprobs=tuple(scored) if at == 0 else ())
        if result.finished and self.finish is None:
            yield self._end(output.finish_reason)

    def _end(self, reason: str | None) -> Delta:
        """The end came without a token that explains it."""
        if reason == "stop":  # the stop token was not given to us
            self.finish = "stop"
            ready, _ = self._stops.push(self._text.flush())
            text = ready + self._stops.flush()
            if self._steps:
                self._steps[-1] += text
            return Delta(self.index, (), text, (), self.finish)
        if reason == "length":
            self.finish = "length"
            return Delta(self.index, (), "", (), self.finish)
        status = 504 if reason == "timeout" else 503
        raise ServingError(f"TensorRT-LLM ended the request: {reason}", status=status)

    def _score(self, result: Any) -> list[TokenLogprob]:
        """Of the prompt's tokens, from the logits at the ones before them."""
        if self.score_top is None:
            return []
        logits = result.context_logits
        if logits is None or logits.shape[0] != len(self.prompt):
            found = "none" if logits is None else f"{logits.shape[0]} rows"
            raise ServingError(
                f"TensorRT-LLM returned no logits of the prompt ({found} for {len(self.prompt)} "
                f"tokens)",
                status=500,
            )
        self.prompt_logprobs = logprobs_of(logits[:-1], self.prompt[1:], self.score_top)
        return self.prompt_logprobs

    def _logprobs_at(self, output: Any, at: int, token: int) -> tuple[TokenLogprob, ...]:
        wanted = self.request.sampling.logprobs
        if wanted is None:
            return ()
        entries: Sequence[Any] = output.logprobs or ()
        if at >= len(entries):
            raise ServingError("TensorRT-LLM returned no log-probabilities", status=500)
        return (token_logprob(entries[at], token, wanted),)


def token_logprob(entry: Any, token: int, top: int) -> TokenLogprob:
    """From what stands at a position: a number, or ``Logprob`` objects by token id."""
    if not isinstance(entry, Mapping):
        return TokenLogprob(token, float(entry))
    values = {int(key): float(item.logprob) for key, item in entry.items()}
    if not math.isfinite(values.get(token, math.nan)):
        raise not_finite()
    best = sorted(values.items(), key=lambda pair: -pair[1])[:top]
    return TokenLogprob(token, values[token], tuple(best))
