"""``/openapi.json`` is true: routes, fields, bounds and answers are those of the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from flask import Flask
from flask.testing import FlaskClient

from serving import chat_api, megatron_api, openai_api
from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.torch_engine import TorchEngine
from tests.serving.conftest import CONTEXT, settings
from tests.serving.models import ByteTokenizer, tiny_model

BODIES: dict[str, dict[str, Any]] = {
    "/api": {"prompts": ["Hello"], "tokens_to_generate": 2},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [72, 105]},
}
FIELDS = {
    "/api": megatron_api.FIELDS,
    "/v1/completions": openai_api.FIELDS,
    "/v1/chat/completions": chat_api.FIELDS,
    "/tokenize": ("prompt", "model"),
    "/detokenize": ("tokens", "model"),
}
# What a field needs beside it to be allowed at all.
BESIDE: dict[str, dict[str, Any]] = {
    "top_p_decay": {"top_p": 1.0},
    "top_p_bound": {"top_p": 1.0},
    "top_logprobs": {"logprobs": True},
    "max_completion_tokens": {"max_tokens": None},
    "stop_token": {"beam_width": 2},
    "length_penalty": {"beam_width": 2},
}
USAGE = {"include_usage": True}


@pytest.fixture(scope="module")
def app() -> Iterator[Flask]:
    engine = TorchEngine(tiny_model(), ByteTokenizer(), context=CONTEXT, report=lambda line: None)
    chat = open_chat("plain", ByteTokenizer(), "tiny")
    yield create_app(engine, settings(chat=chat, max_new_tokens=40, max_prompts=4))
    engine.close(timeout=10)


@pytest.fixture(scope="module")
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture(scope="module")
def described(client: FlaskClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json
    return found


def body_schema(described: dict[str, Any], path: str) -> dict[str, Any]:
    operation = described["paths"][path]["post"]
    schema: dict[str, Any] = operation["requestBody"]["content"]["application/json"]["schema"]
    return schema


def answer_schema(described: dict[str, Any], path: str, method: str, kind: str, code: str) -> Any:
    return described["paths"][path][method]["responses"][code]["content"][kind]["schema"]


def test_every_route_and_verb(app: Flask, described: dict[str, Any]) -> None:
    found = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    told = {(path, method) for path, verbs in described["paths"].items() for method in verbs}
    assert told == found


@pytest.mark.parametrize("path", FIELDS)
def test_every_field(described: dict[str, Any], path: str) -> None:
    assert set(body_schema(described, path)["properties"]) == set(FIELDS[path])


def test_schemas_are_schemas(described: dict[str, Any]) -> None:
    assert described["openapi"].startswith("3.")
    for verbs in described["paths"].values():
        for operation in verbs.values():
            assert operation["summary"] and "200" in operation["responses"]
            bodies = operation.get("requestBody", {}).get("content", {})
            for content in [*bodies.values(), *contents(operation)]:
                jsonschema.Draft202012Validator.check_schema(content["schema"])


def contents(operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for response in operation["responses"].values():
        yield from response["content"].values()


def bounds(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path in FIELDS:
        for name, schema in body_schema(described, path)["properties"].items():
            for part in schema.get("anyOf", [schema]):
                if part.get("type") in ("integer", "number"):
                    yield path, name, part


def test_bounds_are_the_real_ones(client: FlaskClient, described: dict[str, Any]) -> None:
    """The bound itself is not refused for its range, the next number beyond is, by its name."""
    seen = 0
    for path, name, schema in bounds(described):
        body = {**BODIES[path], **BESIDE.get(name, {})}
        step = 1 if schema["type"] == "integer" else 1e-6
        for value, direction in ((schema["minimum"], -1), (schema["maximum"], 1)):
            open_end = schema.get("exclusiveMinimum") == value
            inside = client.post(path, json={**body, name: value})
            if open_end or (name == "top_p_bound" and value == 0):
                assert inside.status_code == 400 and inside.json["error"]["param"] == name
            elif inside.status_code != 200:
                assert "must lie" not in inside.json["error"]["message"], (path, name, value)
            refused = client.post(path, json={**body, name: value + direction * step})
            assert refused.status_code == 400, (path, name, value)
            assert refused.json["error"]["param"] == name
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("path", BODIES)
def test_wrong_values_are_refused_by_schema_and_server(
    client: FlaskClient, described: dict[str, Any], path: str
) -> None:
    """What the schema refuses the server refuses, field by field, and the other way round for
    what it accepts alone."""
    schema = body_schema(described, path)
    validator = jsonschema.Draft202012Validator(schema)
    values = [None, True, -1, 1, 1.5, 10**20, "x", "", [], [1], ["x"], [[]], {}, {"x": 1}]
    for name in schema["properties"]:
        for value in values:
            body = {**BODIES[path], **BESIDE.get(name, {}), name: value}
            status = client.post(path, json=body).status_code
            if not validator.is_valid(body):
                assert status in (400, 404), (name, value)
            else:
                assert status in (200, 400), (name, value)
    assert not validator.is_valid({**BODIES[path], "nonsense": 1})
    assert client.post(path, json={**BODIES[path], "nonsense": 1}).status_code == 400


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/api", {}),
    ("/api", {"logprobs": True}),
    ("/api", {"beam_width": 2}),
    ("/v1/completions", {"n": 2}),
    ("/v1/completions", {"logprobs": 2, "echo": True}),
    ("/completions", {"prompt": "a", "max_tokens": 1}),
    ("/v1/chat/completions", {"n": 2}),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}),
    ("/chat/completions", {**BODIES["/v1/chat/completions"]}),
    ("/tokenize", {}),
    ("/detokenize", {}),
]


@pytest.mark.parametrize(("path", "changes"), REQUESTS)
def test_answers_fit_their_schemas(
    client: FlaskClient, described: dict[str, Any], path: str, changes: dict[str, Any]
) -> None:
    response = client.post(path, json={**BODIES.get(path, {}), **changes})
    assert response.status_code == 200, response.json
    schema = answer_schema(described, path, "post", "application/json", "200")
    jsonschema.validate(response.json, schema)
    error = client.post(path, json={"nonsense": 1}).json
    jsonschema.validate(error, described["components"]["schemas"]["Error"])


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (
            "/v1/completions",
            {"logprobs": 1, "echo": True, "stream_options": {"include_usage": 1 > 0}},
        ),
        ("/v1/chat/completions", {"logprobs": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {}),
    ],
)
def test_chunks_fit_their_schemas(
    client: FlaskClient, described: dict[str, Any], path: str, changes: dict[str, Any]
) -> None:
    schema = answer_schema(described, path, "post", "text/event-stream", "200")
    text = client.post(path, json={**BODIES[path], **changes, "stream": True}).text
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]" and len(events) >= 2
    for event in events:
        jsonschema.validate(json.loads(event), schema)


def test_information_fits_its_schemas(client: FlaskClient, described: dict[str, Any]) -> None:
    for path, verbs in described["paths"].items():
        if "get" not in verbs:
            continue
        real = path.replace("{name}", "main.js" if path.startswith("/page") else "tiny")
        response = client.get(real)
        assert response.status_code == 200, path
        ((kind, content),) = verbs["get"]["responses"]["200"]["content"].items()
        assert response.content_type.startswith(kind), path
        if kind == "application/json":
            jsonschema.validate(response.json, content["schema"])


def test_keys_are_told(client: FlaskClient, app: Flask, described: dict[str, Any]) -> None:
    assert described["security"] == []
    engine = app.extensions["mtk"].engine
    keyed = create_app(engine, settings(api_keys=frozenset({"k"}))).test_client()
    with_keys = keyed.get("/openapi.json", headers={"Authorization": "Bearer k"}).json
    assert with_keys["security"] == [{"bearer": []}, {"password": []}]
    assert with_keys["paths"]["/livez"]["get"]["security"] == []
