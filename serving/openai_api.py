"""``POST /v1/completions`` as OpenAI's clients and lm-evaluation-harness speak it."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify, request

from mtk.errors import ServingError
from serving.body import Fields, checked_text, encode, read_json, wrong_type
from serving.engine import Engine
from serving.openai_objects import Completion, choice, envelope, usage
from serving.requests import GenerationRequest, StopRules
from serving.sampling import (
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)
from serving.service import Service
from serving.settings import ServerSettings

MAX_NEW_TOKENS = 2**31 - 1
# Parts of OpenAI's API that this server does not have, and what may be sent all the same.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
}
FIELDS = (
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "logprobs",
    "echo",
    "seed",
    "stream",
    "stream_options",
    "user",
    *NEUTRAL,
)


def blueprint(service: Service) -> Blueprint:
    from serving.sse import stream_completion

    routes = Blueprint("openai", __name__)

    @routes.post("/v1/completions")
    def completions() -> Response:
        asked = parse(read_json(request), service.engine, service.settings)
        if asked.generation.stream:
            return stream_completion(service, asked)
        outputs = service.answer(asked.generation)
        tokenizer = service.engine.tokenizer
        choices = [choice(output, asked, tokenizer) for output in outputs]
        produced = sum(len(output.tokens) for output in outputs)
        return jsonify(
            {**envelope(service.settings), "choices": choices, "usage": usage(asked, produced)}
        )

    return routes


def parse(data: dict[str, Any], engine: Engine, settings: ServerSettings) -> Completion:
    """Raises ServingError: 404 for another model's name, 400 for anything else amiss."""
    fields = Fields(data)
    fields.refuse_unknown(FIELDS)
    _refuse_unsupported(fields)
    check_model(fields, settings)
    echo, stream = fields.flag("echo"), fields.flag("stream")
    logprobs = fields.optional_integer("logprobs", low=0, high=MAX_TOP_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 16, low=0, high=MAX_NEW_TOKENS)
    if max_tokens == 0 and not echo:
        raise ServingError("max_tokens = 0 needs echo = true", param="max_tokens")
    generation = GenerationRequest(
        prompts=_prompts(fields, engine, settings),
        max_tokens=max_tokens,
        sampling=_sampling(fields, logprobs),
        stop=_stop(fields, engine, settings),
        samples=fields.integer("n", 1, low=1, high=settings.max_sequences),
        prompt_logprobs=echo and logprobs is not None,
        stream=stream,
    )
    fields.text("user")
    if generation.sequences > settings.max_sequences:
        raise ServingError(
            f"{len(generation.prompts)} prompts x n = {generation.samples} are more than "
            f"{settings.max_sequences} sequences",
            param="n",
        )
    return Completion(generation, echo, _include_usage(fields, stream))


def check_model(fields: Fields, settings: ServerSettings) -> None:
    """Raises ServingError (404) for the name of a model that is not served."""
    name = fields.text("model")
    if name is not None and name != settings.model:
        raise ServingError(
            f"the model {name[:80]!r} does not exist here; this server has {settings.model!r}",
            status=404,
            param="model",
        )


def _refuse_unsupported(fields: Fields) -> None:
    for name, allowed in NEUTRAL.items():
        value = fields.raw(name)
        if value is not None and (isinstance(value, bool) or value not in allowed):
            raise ServingError(f"{name} is not supported by this server", param=name)


def _sampling(fields: Fields, logprobs: int | None) -> SamplingParams:
    top_p = fields.number("top_p", 1.0, low=0.0, high=1.0)
    if top_p == 0:
        raise ServingError(
            "top_p = 0: must lie in (0, 1]; temperature = 0 is greedy", param="top_p"
        )
    return SamplingParams(
        temperature=fields.number("temperature", 1.0, low=0.0, high=MAX_TEMPERATURE),
        top_k=fields.integer("top_k", 0, low=0, high=MAX_TOP_K),
        top_p=top_p,
        seed=fields.optional_integer("seed", low=0, high=MAX_SEED),
        logprobs=logprobs,
    )


def _prompts(
    fields: Fields, engine: Engine, settings: ServerSettings
) -> tuple[tuple[int, ...], ...]:
    """Ids of the prompts: a text, texts, ids or lists of ids; empty text is the end of
    document, as in OpenAI's API."""
    value = fields.raw("prompt")
    if value is None:
        raise ServingError("prompt is required: text, ids, or a list of these", param="prompt")
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ServingError("prompt is an empty list", param="prompt")
    if isinstance(value, list) and all(_is_id(item) for item in items):
        return (tuple(items),)
    if len(items) > settings.max_sequences:
        raise ServingError(
            f"prompt holds {len(items)} prompts; at most {settings.max_sequences} are allowed",
            param="prompt",
        )
    return tuple(_ids(item, engine) for item in items)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(item: object, engine: Engine) -> tuple[int, ...]:
    if isinstance(item, list) and item and all(_is_id(token) for token in item):
        return tuple(item)
    if isinstance(item, str):
        return tuple(encode(item, engine.tokenizer, "prompt")) or (engine.tokenizer.eod,)
    if isinstance(item, list):
        raise ServingError("prompt holds a list that is not of token ids", param="prompt")
    raise wrong_type("prompt", item, "text, token ids, or a list of these")


def _stop(fields: Fields, engine: Engine, settings: ServerSettings) -> StopRules:
    end = frozenset({engine.tokenizer.eod})
    value = fields.raw("stop")
    if value is None:
        return StopRules(token_ids=end)
    items = value if isinstance(value, list) else [value]
    if len(items) > settings.max_stop_strings:
        raise ServingError(
            f"stop holds {len(items)} texts; at most {settings.max_stop_strings} are allowed",
            param="stop",
        )
    for item in items:
        if not 1 <= len(checked_text("stop", item)) <= settings.max_stop_length:
            raise ServingError(
                f"stop texts must have 1..{settings.max_stop_length} characters", param="stop"
            )
    return StopRules(token_ids=end, strings=tuple(items))


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.raw("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong_type("stream_options", options, "an object")
    if not stream:
        raise ServingError("stream_options needs stream = true", param="stream_options")
    inner = Fields(options)
    inner.refuse_unknown(("include_usage",))
    return inner.flag("include_usage")
