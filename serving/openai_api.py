"""``POST /v1/completions`` as OpenAI's clients and lm-evaluation-harness speak it."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from mtk.errors import ServingError
from serving.body import Fields, encode, read_json, wrong_type
from serving.encoder_prompt import refuse_for_encoder
from serving.engine import Engine
from serving.openai_fields import (
    SHARED,
    check_model,
    check_prompt_tokens,
    guide,
    include_usage,
    refuse_unsupported,
    samples,
    sampling,
    stop_rules,
)
from serving.openai_objects import Completion, CompletionObjects
from serving.requests import GenerationRequest
from serving.service import Service
from serving.settings import ServerSettings
from serving.sse import answer_or_stream

# Parts of OpenAI's API that this server does not have, and what may be sent all the same.
NEUTRAL: dict[str, tuple[object, ...]] = {"best_of": (1,), "suffix": ("",)}
FIELDS = (*SHARED, "prompt", "logprobs", "echo", *NEUTRAL)


def blueprint(service: Service) -> Blueprint:
    """Also without ``/v1``, as Megatron-LM's servers have it."""
    routes = Blueprint("openai", __name__)

    @routes.post("/v1/completions")
    @routes.post("/completions")
    def completions() -> Response:
        asked = parse(read_json(request), service)
        return answer_or_stream(service, asked, CompletionObjects(service, asked))

    return routes


def parse(data: dict[str, Any], service: Service) -> Completion:
    """Raises ServingError: 404 for another model's name, 400 for anything else amiss."""
    engine, settings = service.engine, service.settings
    fields = Fields(data)
    fields.refuse_unknown(FIELDS)
    refuse_unsupported(fields, NEUTRAL)
    check_model(fields, settings)
    echo, stream = fields.flag("echo"), fields.flag("stream")
    if echo:
        refuse_for_encoder(engine.encoder, "echo", "the prompt in front of the answer")
    logprobs = fields.optional_integer(
        "logprobs", low=0, high=settings.max_top_logprobs, limit="max_top_logprobs"
    )
    max_tokens = fields.integer(
        "max_tokens", 16, low=0, high=settings.most_new_tokens, limit="max_new_tokens"
    )
    if max_tokens == 0:
        refuse_for_encoder(engine.encoder, "max_tokens", "0, scores of the prompt alone")
    if max_tokens == 0 and not echo:
        raise ServingError("max_tokens = 0 needs echo = true", param="max_tokens")
    prompts = _prompts(fields, engine, settings)
    check_prompt_tokens(prompts, settings, "prompt")
    generation = GenerationRequest(
        prompts=prompts,
        max_tokens=max_tokens,
        sampling=sampling(fields, logprobs),
        stop=stop_rules(fields, engine, settings),
        samples=samples(fields, len(prompts), settings),
        prompt_logprobs=echo and logprobs is not None,
        stream=stream,
        guide=guide(fields, engine, settings, service.grammars),
    )
    fields.text("user")
    return Completion(generation, echo, include_usage(fields, stream))


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
    if len(items) > settings.max_prompts:
        raise ServingError(
            f"prompt holds {len(items)} prompts; at most {settings.max_prompts} are allowed "
            f"(max_prompts)",
            param="prompt",
        )
    return tuple(_ids(item, engine) for item in items)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(item: object, engine: Engine) -> tuple[int, ...]:
    if isinstance(item, list) and item and all(_is_id(token) for token in item):
        return tuple(item)
    if isinstance(item, str):
        framed = engine.encoder is not None
        ids = tuple(encode(item, engine.tokenizer, "prompt", framed=framed))
        return ids or (engine.tokenizer.eod,)
    if isinstance(item, list):
        raise ServingError("prompt holds a list that is not of token ids", param="prompt")
    raise wrong_type("prompt", item, "text, token ids, or a list of these")
