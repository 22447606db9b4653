"""JSON Schemas of what clients send, with this server's limits in them."""

from __future__ import annotations

from typing import Any

from serving.chat_prompt import ROLES
from serving.guides import MAX_BIAS, MAX_REPEAT_PENALTY
from serving.openai_fields import FORMATS
from serving.requests import MAX_PENALTY
from serving.sampling import MAX_SEED, MAX_TEMPERATURE, MAX_TOP_K
from serving.settings import ServerSettings

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}


def whole(low: int, high: int, default: int | None = None) -> Schema:
    found: Schema = {"type": "integer", "minimum": low, "maximum": high}
    return found if default is None else {**found, "default": default}


def number(low: float, high: float, default: float, **more: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high, "default": default, **more}


def array(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    found: Schema = {"type": "array", "items": items, "minItems": low}
    return found if high is None else {**found, "maxItems": high}


def record(properties: dict[str, Schema], *required: str) -> Schema:
    """An object without any other properties."""
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": list(required)} if required else found


def nullable(properties: dict[str, Schema], *required: str) -> dict[str, Schema]:
    """An explicit null is as good as leaving a field out."""
    return {
        name: schema if name in required else {"anyOf": [schema, {"type": "null"}]}
        for name, schema in properties.items()
    }


def request(properties: dict[str, Schema], *required: str) -> Schema:
    return record(nullable(properties, *required), *required)


def megatron(settings: ServerSettings, vocab: int) -> Schema:
    """``PUT /api``."""
    prompts = min(settings.max_prompts, settings.max_sequences)
    return request(
        {
            "prompts": array(TEXT, 1, prompts),
            "tokens_to_generate": whole(0, settings.most_new_tokens, 64),
            "logprobs": FLAG,
            "temperature": number(0, MAX_TEMPERATURE, 1.0, exclusiveMinimum=0),
            "top_k": whole(0, MAX_TOP_K, 0),
            "top_p": number(0, 1, 0.0),
            "top_p_decay": number(0, 1, 0.0),
            "top_p_bound": number(0, 1, 0.0),
            "add_BOS": FLAG,
            "stop_on_double_eol": FLAG,
            "stop_on_eol": FLAG,
            "prevent_newline_after_colon": FLAG,
            "random_seed": whole(0, MAX_SEED),
            "no_log": FLAG,
            "beam_width": whole(1, settings.max_beam_width),
            "stop_token": whole(0, vocab - 1),
            "length_penalty": number(-MAX_PENALTY, MAX_PENALTY, 1.0),
        },
        "prompts",
    )


def _shared(settings: ServerSettings, vocab: int) -> dict[str, Schema]:
    stop = {**TEXT, "minLength": 1, "maxLength": settings.max_stop_length}
    bias = {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}
    return {
        "model": {"const": settings.model},
        "max_tokens": whole(0, settings.most_new_tokens, 16),
        "temperature": number(0, MAX_TEMPERATURE, 1.0),
        "top_p": number(0, 1, 1.0, exclusiveMinimum=0),
        "top_k": whole(0, MAX_TOP_K, 0),
        "n": whole(1, settings.max_sequences, 1),
        "stop": {"anyOf": [stop, array(stop, 0, settings.max_stop_strings)]},
        "seed": whole(0, MAX_SEED),
        "stream": FLAG,
        "stream_options": record(nullable({"include_usage": FLAG})),
        "presence_penalty": number(-MAX_REPEAT_PENALTY, MAX_REPEAT_PENALTY, 0.0),
        "frequency_penalty": number(-MAX_REPEAT_PENALTY, MAX_REPEAT_PENALTY, 0.0),
        "logit_bias": {
            "type": "object",
            "description": f"Token ids 0..{vocab - 1} as text, and what is added to their logits.",
            "maxProperties": settings.max_logit_bias,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": bias,
        },
        "response_format": _response_format(),
        "user": TEXT,
    }


def _response_format() -> Schema:
    described = record(
        {"name": TEXT, "description": TEXT, "schema": {"type": "object"}, "strict": FLAG}, "schema"
    )
    plain = record({"type": {"enum": [f for f in FORMATS if f != "json_schema"]}}, "type")
    by_schema = record(
        {"type": {"const": "json_schema"}, "json_schema": described}, "type", "json_schema"
    )
    return {"anyOf": [plain, by_schema]}


def completion(settings: ServerSettings, vocab: int) -> Schema:
    """``POST /v1/completions``."""
    ids = array(whole(0, vocab - 1), 1)
    return request(
        {
            **_shared(settings, vocab),
            "prompt": {
                "anyOf": [TEXT, ids, array({"anyOf": [TEXT, ids]}, 1, settings.max_prompts)]
            },
            "logprobs": whole(0, settings.max_top_logprobs),
            "echo": FLAG,
            "best_of": {"const": 1},
            "suffix": {"const": ""},
        },
        "prompt",
    )


def chat(settings: ServerSettings, vocab: int) -> Schema:
    """``POST /v1/chat/completions``."""
    part = record({"type": {"const": "text"}, "text": TEXT}, "type", "text")
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [TEXT, array(part)]},
            "name": TEXT,
        },
        "required": ["role", "content"],
    }
    new = whole(1, settings.most_new_tokens)
    none: Schema = {"type": "array", "maxItems": 0}
    return request(
        {
            **_shared(settings, vocab),
            "messages": array(message, 1),
            "max_tokens": new,
            "max_completion_tokens": new,
            "logprobs": FLAG,
            "top_logprobs": whole(0, settings.max_top_logprobs),
            "tools": none,
            "tool_choice": {"enum": ["none", "auto"]},
            "parallel_tool_calls": FLAG,
            "functions": none,
            "modalities": {"const": ["text"]},
            "store": {"const": False},
            "service_tier": {"enum": ["auto", "default"]},
        },
        "messages",
    )


def tokenize(settings: ServerSettings) -> Schema:
    return request({"prompt": TEXT, "model": {"const": settings.model}}, "prompt")


def detokenize(settings: ServerSettings, vocab: int) -> Schema:
    ids = array(whole(0, vocab - 1))
    return request({"tokens": ids, "model": {"const": settings.model}}, "tokens")
