"""JSON Schemas of what the server answers; every property that is listed is always there."""

from __future__ import annotations

from serving.openapi_requests import FLAG, TEXT, Schema, array, record

COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FINISH: Schema = {"enum": ["stop", "length"]}


def full(properties: dict[str, Schema]) -> Schema:
    return record(properties, *properties)


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


ERROR = full(
    {
        "error": full(
            {
                "message": TEXT,
                "type": TEXT,
                "param": or_null(TEXT),
                "code": {"type": ["integer", "string"]},
            }
        )
    }
)
USAGE = full({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
MEGATRON_SAMPLED = full(
    {
        "text": array(TEXT),
        "segments": array(array(TEXT)),
        "tokens": array(array(COUNT)),
        "logprobs": or_null(array(array(NUMBER))),
    }
)
MEGATRON_BEAMS = full(
    {
        "text": array(TEXT),
        "segments": array(array(TEXT)),
        "tokens": array(array(COUNT)),
        "scores": array(NUMBER),
    }
)
MEGATRON: Schema = {"oneOf": [MEGATRON_SAMPLED, MEGATRON_BEAMS]}


def _envelope(kind: str) -> dict[str, Schema]:
    return {"id": TEXT, "object": {"const": kind}, "created": COUNT, "model": TEXT}


LOGPROBS = full(
    {
        "tokens": array(TEXT),
        "token_logprobs": array(or_null(NUMBER)),
        "top_logprobs": array(or_null({"type": "object", "additionalProperties": NUMBER})),
        "text_offset": array(COUNT),
    }
)


def _choice(finish: Schema) -> Schema:
    return full(
        {"index": COUNT, "text": TEXT, "logprobs": or_null(LOGPROBS), "finish_reason": finish}
    )


COMPLETION = full(
    {**_envelope("text_completion"), "choices": array(_choice(FINISH)), "usage": USAGE}
)
COMPLETION_CHUNK = record(
    {**_envelope("text_completion"), "choices": array(_choice(or_null(FINISH))), "usage": USAGE},
    *_envelope(""),
    "choices",
)
_TOKEN: dict[str, Schema] = {
    "token": TEXT,
    "logprob": NUMBER,
    "bytes": or_null(array({"type": "integer", "minimum": 0, "maximum": 255})),
}
CHAT_LOGPROBS = full({"content": array(full({**_TOKEN, "top_logprobs": array(full(_TOKEN))}))})
CHAT = full(
    {
        **_envelope("chat.completion"),
        "choices": array(
            full(
                {
                    "index": COUNT,
                    "message": full(
                        {
                            "role": {"const": "assistant"},
                            "content": TEXT,
                            "refusal": {"type": "null"},
                        }
                    ),
                    "logprobs": or_null(CHAT_LOGPROBS),
                    "finish_reason": FINISH,
                }
            )
        ),
        "usage": USAGE,
    }
)
CHAT_CHUNK = record(
    {
        **_envelope("chat.completion.chunk"),
        "choices": array(
            full(
                {
                    "index": COUNT,
                    "delta": record({"role": {"const": "assistant"}, "content": TEXT}),
                    "logprobs": or_null(CHAT_LOGPROBS),
                    "finish_reason": or_null(FINISH),
                }
            )
        ),
        "usage": USAGE,
    },
    *_envelope(""),
    "choices",
)
MODEL = full(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": TEXT,
        "max_model_len": COUNT,
        "max_encoder_len": or_null(COUNT),
        "chat": FLAG,
    }
)
MODELS = full({"object": {"const": "list"}, "data": array(MODEL)})
LINEAGE: Schema = {
    "type": "object",
    "properties": {"kind": TEXT, "digest": TEXT},
    "required": ["kind", "digest"],
}
TOKENS = full({"tokens": array(COUNT), "count": COUNT, "max_model_len": COUNT})
PROMPT = full({"prompt": TEXT})
LIVE = full({"status": {"const": "live"}})
HEALTH = full(
    {
        "status": {"enum": ["ok", "unavailable"]},
        "ready": FLAG,
        "reason": TEXT,
        "running": COUNT,
        "waiting": COUNT,
        "in_flight": COUNT,
    }
)
