"""``POST /v1/chat/completions`` as OpenAI's clients speak it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flask import Blueprint, Response, request

from mtk.errors import ServingError
from serving.body import Fields, read_json
from serving.chat_objects import ChatObjects
from serving.chat_prompt import ChatPrompt, parse_messages
from serving.openai_fields import (
    SHARED,
    check_model,
    check_prompt_tokens,
    guide,
    include_usage,
    refuse_unsupported,
    samples,
    sampling,
    stop_strings,
)
from serving.requests import GenerationRequest
from serving.service import Service
from serving.settings import ServerSettings
from serving.sse import answer_or_stream

# Parts of OpenAI's API that this server does not have, and what may be sent all the same.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
FIELDS = (*SHARED, "messages", "max_completion_tokens", "logprobs", "top_logprobs", *NEUTRAL)


@dataclass(frozen=True)
class Chat:
    """A parsed request and how its answer is to look."""

    generation: GenerationRequest
    include_usage: bool


def blueprint(service: Service) -> Blueprint:
    """Also without ``/v1``, as Megatron-LM's servers have it."""
    routes = Blueprint("chat", __name__)

    @routes.post("/v1/chat/completions")
    @routes.post("/chat/completions")
    def chat() -> Response:
        asked = parse(read_json(request), service)
        objects = ChatObjects(service, asked.generation, include_usage=asked.include_usage)
        return answer_or_stream(service, asked, objects)

    return routes


def parse(data: dict[str, Any], service: Service) -> Chat:
    """Raises ServingError: 404 for another model's name, 400 for anything else amiss."""
    engine, settings = service.engine, service.settings
    fields = Fields(data)
    fields.refuse_unknown(FIELDS)
    refuse_unsupported(fields, NEUTRAL)
    check_model(fields, settings)
    prompt = _template(settings).ids(parse_messages(fields.raw("messages")))
    check_prompt_tokens([prompt], settings, "messages")
    stream = fields.flag("stream")
    room = engine.context - (len(prompt) if engine.encoder is None else 0)
    generation = GenerationRequest(
        prompts=(prompt,),
        max_tokens=_max_tokens(fields, settings, room),
        sampling=sampling(fields, _logprobs(fields, settings)),
        stop=_template(settings).stop,
        samples=samples(fields, 1, settings),
        stream=stream,
        guide=guide(fields, engine, settings, service.grammars),
    )
    own = stop_strings(fields, settings)
    if own:
        stop = replace(generation.stop, strings=(*generation.stop.strings, *own))
        generation = replace(generation, stop=stop)
    fields.text("user")
    return Chat(generation, include_usage(fields, stream))


def _template(settings: ServerSettings) -> ChatPrompt:
    if settings.chat is None:
        raise ServingError(
            "this model brings no chat template: start the server with --chat-template chatml, "
            "llama3, plain or a file, or use /v1/completions",
            param="messages",
        )
    return settings.chat


def _max_tokens(fields: Fields, settings: ServerSettings, room: int) -> int:
    """As asked, else what there is room for."""
    both = fields.given("max_tokens") and fields.given("max_completion_tokens")
    if both and fields.raw("max_tokens") != fields.raw("max_completion_tokens"):
        raise ServingError(
            "max_tokens and max_completion_tokens contradict each other; the latter is the newer "
            "name",
            param="max_completion_tokens",
        )
    name = "max_completion_tokens" if fields.given("max_completion_tokens") else "max_tokens"
    high = settings.most_new_tokens
    # With no room left the engine refuses the prompt by its length.
    default = max(1, min(room, high))
    return fields.integer(name, default, low=1, high=high, limit="max_new_tokens")


def _logprobs(fields: Fields, settings: ServerSettings) -> int | None:
    wanted = fields.flag("logprobs")
    high = settings.max_top_logprobs
    top = fields.optional_integer("top_logprobs", low=0, high=high, limit="max_top_logprobs")
    if top is not None and not wanted:
        raise ServingError("top_logprobs needs logprobs = true", param="top_logprobs")
    return (top or 0) if wanted else None
