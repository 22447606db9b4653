"""``GET /openapi.json``: this server's interface in OpenAPI 3.1, its limits included.

Tests hold it against the code: every route and field is here, every bound is the real one, and
real answers fit the schemas.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

from serving import openapi_answers as answers
from serving import openapi_requests as requests
from serving.openapi_requests import TEXT, Schema
from serving.service import Service

VERSION = "3.1.0"
# What a generating route may refuse with.
REFUSALS = {
    "400": "A field is wrong, or a limit of the server is exceeded; `param` names the field.",
    "408": "The request took too long to arrive.",
    "413": "The body is larger than the server allows.",
    "415": "The body is not declared as JSON.",
    "429": "The server is full; the header Retry-After says for how many seconds.",
    "503": "The server is stopping or its engine died.",
    "504": "The request took longer than the server allows.",
}
UNAUTHORIZED = {"401": "A valid API key is needed."}


def blueprint(service: Service) -> Blueprint:
    routes = Blueprint("openapi", __name__)

    @routes.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(description(service))

    return routes


def description(service: Service) -> dict[str, Any]:
    paths = {**_generating(service), **_informing(), **_tokenizing(service)}
    return {
        "openapi": VERSION,
        "info": {
            "title": "mtk",
            "version": "1",
            "summary": "Text generation: Megatron-LM's and OpenAI's interfaces on one engine.",
        },
        "security": [{"bearer": []}, {"password": []}] if service.settings.api_keys else [],
        "paths": paths,
        "components": {
            "schemas": {"Error": answers.ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "password": {"type": "http", "scheme": "basic"},
            },
        },
    }


def _generating(service: Service) -> dict[str, Any]:
    settings, vocab = service.settings, service.engine.vocab_size
    api = _with_body(
        "Megatron-LM's text generation",
        requests.megatron(settings, vocab),
        {"application/json": answers.MEGATRON},
        REFUSALS,
    )
    completions = _with_body(
        "Continue prompts, as OpenAI's completions",
        requests.completion(settings, vocab),
        _or_events(answers.COMPLETION, answers.COMPLETION_CHUNK),
        {**REFUSALS, "404": "`model` is not the served model."},
    )
    chat = _with_body(
        "Answer messages, as OpenAI's chat completions",
        requests.chat(settings, vocab),
        _or_events(answers.CHAT, answers.CHAT_CHUNK),
        {**REFUSALS, "404": "`model` is not the served model."},
    )
    return {
        "/api": {"put": api, "post": api},
        "/v1/completions": {"post": completions},
        "/completions": {"post": completions},
        "/v1/chat/completions": {"post": chat},
        "/chat/completions": {"post": chat},
    }


def _tokenizing(service: Service) -> dict[str, Any]:
    settings, vocab = service.settings, service.engine.vocab_size
    refusals = {code: REFUSALS[code] for code in ("400", "408", "413", "415")}
    refusals["404"] = "`model` is not the served model."
    return {
        "/tokenize": {
            "post": _with_body(
                "Token ids of a text",
                requests.tokenize(settings),
                {"application/json": answers.TOKENS},
                refusals,
            )
        },
        "/detokenize": {
            "post": _with_body(
                "Text of token ids",
                requests.detokenize(settings, vocab),
                {"application/json": answers.PROMPT},
                refusals,
            )
        },
    }


def _informing() -> dict[str, Any]:
    unhealthy = {"503": _answer("It is not.", answers.HEALTH)}
    missing = {"404": "There is none."}
    named = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    live = _get("Whether HTTP is answered; needs no key", answers.LIVE)
    live = {**live, "security": [], "responses": {"200": live["responses"]["200"]}}
    return {
        "/livez": {"get": live},
        "/readyz": {
            "get": _get(
                "Whether a token was decoded just now and a request would be taken",
                answers.HEALTH,
                more=unhealthy,
            )
        },
        "/health": {
            "get": _get("Whether a token was decoded just now", answers.HEALTH, more=unhealthy)
        },
        "/v1/models": {"get": _get("The served model in a list", answers.MODELS)},
        "/v1/models/{name}": {
            "get": {**_get("The served model", answers.MODEL, missing), "parameters": [named]}
        },
        "/v1/lineage": {"get": _get("Digests back to the corpus", answers.LINEAGE, missing)},
        "/metrics": {"get": _get("Figures for Prometheus", TEXT, kind="text/plain")},
        "/openapi.json": {"get": _get("This description", {"type": "object"})},
        "/": {"get": _get("A page to try the model", TEXT, kind="text/html")},
        "/page/{name}": {
            "get": {
                **_get("Parts of the page", TEXT, missing, kind="text/javascript"),
                "parameters": [named],
            }
        },
    }


def _with_body(
    summary: str, body: Schema, content: dict[str, Schema], refusals: dict[str, str]
) -> dict[str, Any]:
    found = {kind: {"schema": schema} for kind, schema in content.items()}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "The answer.", "content": found}, **_errors(refusals)},
    }


def _or_events(whole: Schema, chunk: Schema) -> dict[str, Schema]:
    """Server-sent events have no schema of their own; the one of their data stands in."""
    return {"application/json": whole, "text/event-stream": chunk}


def _get(
    summary: str,
    schema: Schema,
    refusals: dict[str, str] | None = None,
    *,
    kind: str = "application/json",
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    good = _answer("The answer.", schema, kind)
    return {
        "summary": summary,
        "responses": {"200": good, **_errors(refusals or {}), **(more or {})},
    }


def _answer(text: str, schema: Schema, kind: str = "application/json") -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": schema}}}


def _errors(refusals: dict[str, str]) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    return {
        code: _answer(text, error) for code, text in sorted({**refusals, **UNAUTHORIZED}.items())
    }
