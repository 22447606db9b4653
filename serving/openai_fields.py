"""The fields that OpenAI's completions and chat completions have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtk.errors import ServingError
from serving.body import Fields, checked_text, wrong_type
from serving.encoder_prompt import end_tokens
from serving.engine import Engine
from serving.grammar import ANY_OBJECT, JsonGrammars
from serving.guides import MAX_BIAS, MAX_REPEAT_PENALTY, Guide
from serving.requests import StopRules
from serving.sampling import MAX_SEED, MAX_TEMPERATURE, MAX_TOP_K, SamplingParams
from serving.settings import ServerSettings

SHARED = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "response_format",
    "user",
)
FORMATS = ("text", "json_object", "json_schema")


def check_model(fields: Fields, settings: ServerSettings) -> None:
    """Raises ServingError (404) for the name of a model that is not served."""
    name = fields.text("model")
    if name is not None and name != settings.model:
        raise ServingError(
            f"the model {name[:80]!r} does not exist here; this server has {settings.model!r}",
            status=404,
            param="model",
        )


def refuse_unsupported(fields: Fields, neutral: Mapping[str, Sequence[object]]) -> None:
    """Raises ServingError (400) for a part of OpenAI's API that this server does not have.

    neutral: those parts, and which values mean the same without them.
    """
    for name, allowed in neutral.items():
        value = fields.raw(name)
        # 0 == False in Python, but not in JSON.
        same = any(type(value) is type(each) and value == each for each in allowed)
        if value is not None and not same:
            raise ServingError(f"{name} is not supported by this server", param=name)


def sampling(fields: Fields, logprobs: int | None) -> SamplingParams:
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


def stop_strings(fields: Fields, settings: ServerSettings) -> tuple[str, ...]:
    value = fields.raw("stop")
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    if len(items) > settings.max_stop_strings:
        raise ServingError(
            f"stop holds {len(items)} texts; at most {settings.max_stop_strings} are allowed "
            f"(max_stop_strings)",
            param="stop",
        )
    for item in items:
        if not 1 <= len(checked_text("stop", item)) <= settings.max_stop_length:
            raise ServingError(
                f"stop texts must have 1..{settings.max_stop_length} characters (max_stop_length)",
                param="stop",
            )
    return tuple(items)


def stop_rules(fields: Fields, engine: Engine, settings: ServerSettings) -> StopRules:
    ends = end_tokens(engine.tokenizer, engine.encoder)
    return StopRules(token_ids=ends, strings=stop_strings(fields, settings))


def samples(fields: Fields, prompts: int, settings: ServerSettings) -> int:
    limit = settings.max_sequences
    found = fields.integer("n", 1, low=1, high=limit, limit="max_sequences")
    if prompts * found > limit:
        raise ServingError(
            f"{prompts} prompts x n = {found} are more than {limit} sequences (max_sequences)",
            param="n",
        )
    return found


def check_prompt_tokens(
    prompts: Sequence[Sequence[int]], settings: ServerSettings, param: str
) -> None:
    """Raises ServingError (400) for a prompt over the server's own limit."""
    limit = settings.max_prompt_tokens
    if limit is not None and any(len(prompt) > limit for prompt in prompts):
        longest = max(map(len, prompts))
        raise ServingError(
            f"a prompt has {longest} tokens; at most {limit} are allowed (max_prompt_tokens)",
            param=param,
        )


def include_usage(fields: Fields, stream: bool) -> bool:
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


def guide(
    fields: Fields, engine: Engine, settings: ServerSettings, grammars: JsonGrammars
) -> Guide | None:
    """What the request asks to be done to logits; None for nothing."""
    high = MAX_REPEAT_PENALTY
    found = Guide(
        logit_bias=_logit_bias(fields, engine, settings),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-high, high=high),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-high, high=high),
        grammar=_grammar(fields, settings, grammars),
    )
    return None if found == Guide() else found


def _logit_bias(
    fields: Fields, engine: Engine, settings: ServerSettings
) -> tuple[tuple[int, float], ...]:
    value = fields.raw("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise wrong_type("logit_bias", value, "an object of token ids and numbers")
    if len(value) > settings.max_logit_bias:
        raise ServingError(
            f"logit_bias has {len(value)} tokens; at most {settings.max_logit_bias} are allowed "
            f"(max_logit_bias)",
            param="logit_bias",
        )
    values = Fields(value)
    last = engine.vocab_size - 1
    for name in value:
        # isdecimal() alone would take digits of other scripts.
        good = name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) <= last
        if not good:
            rule = f"token ids lie in 0..{last}"
            raise ServingError(f"logit_bias has the key {name[:40]!r}; {rule}", param="logit_bias")
        if values.raw(name) is None:
            raise wrong_type("logit_bias", None, "an object of token ids and numbers")
    try:
        found = {
            int(name): values.number(name, 0.0, low=-MAX_BIAS, high=MAX_BIAS) for name in value
        }
    except ServingError as error:
        raise ServingError(f"logit_bias: {error}", param="logit_bias") from None
    return tuple(found.items())


def _grammar(fields: Fields, settings: ServerSettings, grammars: JsonGrammars) -> Any:
    wanted = fields.raw("response_format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        raise wrong_type("response_format", wanted, "an object")
    kind = wanted.get("type")
    if kind not in FORMATS:
        rule = f"type must be one of {', '.join(FORMATS)}"
        raise ServingError(f"response_format: {rule}", param="response_format")
    _known(wanted, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "text":
        return None
    return grammars.compile(ANY_OBJECT if kind == "json_object" else _schema(wanted, settings))


def _schema(wanted: Mapping[str, Any], settings: ServerSettings) -> Mapping[str, Any]:
    described = wanted.get("json_schema")
    if not isinstance(described, dict):
        raise ServingError(
            "response_format.json_schema must be an object with a schema", param="response_format"
        )
    _known(described, ("name", "description", "schema", "strict"))
    schema = described.get("schema")
    if not isinstance(schema, dict):
        raise ServingError(
            "response_format.json_schema.schema must be an object", param="response_format"
        )
    size = len(json.dumps(schema))
    if size > settings.max_schema_bytes:
        raise ServingError(
            f"the JSON schema has {size} bytes; at most {settings.max_schema_bytes} are allowed "
            f"(max_schema_bytes)",
            param="response_format",
        )
    return schema


def _known(data: Mapping[str, Any], known: Sequence[str]) -> None:
    try:
        Fields(data).refuse_unknown(known)
    except ServingError as error:
        raise ServingError(f"response_format: {error}", param="response_format") from None
