"""Who may ask, and how much: keys on every route, limits by name, what browsers are told."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from mtk.config import make
from mtk.config.serve import LimitsConfig, ListenConfig, ServeConfig
from mtk.errors import ConfigError
from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.page_routes import KINDS
from serving.torch_engine import TorchEngine
from stages.serve import server_settings
from tests.serving.conftest import settings
from tests.serving.models import ByteTokenizer

MakeEngine = Callable[..., TorchEngine]
KEY = "s3cret"


@pytest.fixture
def keyed(make_engine: MakeEngine) -> Flask:
    return create_app(make_engine(), settings(api_keys=frozenset({KEY, "other"})))


def routes(app: Flask) -> Iterator[tuple[str, str]]:
    for rule in app.url_map.iter_rules():
        for method in rule.methods or set():
            yield method, rule.rule.replace("<path:name>", "tiny").replace("<name>", "main.js")


def test_every_route_needs_a_key_but_livez(keyed: Flask) -> None:
    client = keyed.test_client()
    tried = [*routes(keyed), ("GET", "/nothing"), ("PUT", "/livez/")]
    assert len(tried) > 40
    for method, path in tried:
        response = client.open(path, method=method)
        if path == "/livez":
            assert response.status_code == 200
            continue
        assert response.status_code == 401, (method, path)
        challenge = response.headers["WWW-Authenticate"]
        assert challenge.startswith("Basic" if path == "/" else "Bearer")


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY} ", 200),
        ("Bearer other", 200),
        (basic("", KEY), 200),
        (basic("anybody", KEY), 200),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (KEY, 401),
        (f"Token {KEY}", 401),
        (basic(KEY, ""), 401),
        (basic("", ""), 401),
        (f"Basic {KEY}", 401),
        ("Basic ####", 401),
        ("Basic " + base64.b64encode(KEY.encode()).decode(), 401),
    ],
)
def test_forms_of_a_key(keyed: Flask, header: str, status: int) -> None:
    response = keyed.test_client().get("/v1/models", headers={"Authorization": header})
    assert response.status_code == status


def test_all_keys_are_compared_whole(keyed: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(sent: bytes, key: bytes) -> bool:
        compared.append(key)
        return sent == key

    monkeypatch.setattr("serving.app.hmac.compare_digest", compare)
    client = keyed.test_client()
    for header in (f"Bearer {KEY}", "Bearer other", "Bearer wrong"):
        compared.clear()
        client.get("/v1/models", headers={"Authorization": header})
        assert sorted(compared) == [b"other", KEY.encode()]


LIMITED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("max_prompts", {"max_prompts": 1}, "/v1/completions", {"prompt": ["a", "b"]}),
    ("max_prompts", {"max_prompts": 1}, "/api", {"prompts": ["a", "b"]}),
    ("max_sequences", {"max_sequences": 3}, "/v1/completions", {"prompt": ["a", "b"], "n": 2}),
    ("max_sequences", {"max_sequences": 3}, "/v1/completions", {"prompt": "a", "n": 4}),
    ("max_sequences", {"max_sequences": 3}, "/v1/chat/completions", {"n": 4}),
    ("max_prompt_tokens", {"max_prompt_tokens": 2}, "/v1/completions", {"prompt": "abc"}),
    ("max_prompt_tokens", {"max_prompt_tokens": 2}, "/api", {"prompts": ["a", "abc"]}),
    ("max_prompt_tokens", {"max_prompt_tokens": 2}, "/v1/chat/completions", {}),
    ("max_new_tokens", {"max_new_tokens": 4}, "/v1/completions", {"prompt": "a", "max_tokens": 5}),
    ("max_new_tokens", {"max_new_tokens": 4}, "/api", {"prompts": ["a"], "tokens_to_generate": 5}),
    ("max_new_tokens", {"max_new_tokens": 4}, "/v1/chat/completions", {"max_tokens": 5}),
    ("max_stop_strings", {"max_stop_strings": 1}, "/v1/completions", {"stop": ["a", "b"]}),
    ("max_stop_length", {"max_stop_length": 1}, "/v1/chat/completions", {"stop": "ab"}),
    ("max_top_logprobs", {"max_top_logprobs": 1}, "/v1/completions", {"logprobs": 2}),
    (
        "max_top_logprobs",
        {"max_top_logprobs": 1},
        "/v1/chat/completions",
        {"logprobs": True, "top_logprobs": 2},
    ),
    (
        "max_logit_bias",
        {"max_logit_bias": 1},
        "/v1/completions",
        {"logit_bias": {"1": 1, "2": 1}},
    ),
    (
        "max_schema_bytes",
        {"max_schema_bytes": 5},
        "/v1/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
    ),
    ("max_beam_width", {"max_beam_width": 2}, "/api", {"prompts": ["a"], "beam_width": 3}),
]
USUAL: dict[str, dict[str, Any]] = {
    "/api": {},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize(("name", "limits", "path", "body"), LIMITED)
def test_limits_are_named(
    make_engine: MakeEngine, name: str, limits: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    chat = open_chat("plain", ByteTokenizer(), "tiny")
    engine = make_engine()
    client = create_app(engine, settings(chat=chat, **limits)).test_client()
    response = client.post(path, json={**USUAL[path], **body})
    assert response.status_code == 400 and name in response.json["error"]["message"]
    free = create_app(engine, settings(chat=chat)).test_client()
    assert free.post(path, json={**USUAL[path], **body}).status_code == 200


def test_every_limit_is_an_option() -> None:
    """What the configuration says arrives in the server, field by field."""
    values = {
        name: getattr(LimitsConfig(), name) or 7
        for name in vars(LimitsConfig())
        if name in vars(settings())
    }
    changed = {name: value / 2 if isinstance(value, float) else 5 for name, value in values.items()}
    assert len(changed) >= 16
    config = make(ServeConfig, load="x", **changed)
    found = server_settings(
        config, lineage=None, keys=frozenset(), chat=None, log=lambda line: None
    )
    assert {name: getattr(found, name) for name in changed} == changed


@pytest.mark.parametrize(
    "changes",
    [
        {"max_prompts": 0},
        {"max_prompt_tokens": 0},
        {"max_new_tokens": -1},
        {"max_stop_strings": -1},
        {"max_top_logprobs": 21},
        {"read_timeout": 0.0},
        {"write_timeout": float("inf")},
        {"probe_timeout": float("nan")},
        {"chat_template": ""},
    ],
)
def test_limits_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        make(ServeConfig, load="x", **changes)


def test_only_this_machine_by_default() -> None:
    assert ListenConfig().host == "127.0.0.1"


def test_what_browsers_are_told(client: FlaskClient) -> None:
    for path in ("/", "/page/main.js", "/v1/models", "/nothing"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
    policy = client.get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_the_page_has_a_closed_list_of_parts(client: FlaskClient) -> None:
    for name, kind in KINDS.items():
        response = client.get(f"/page/{name}")
        assert response.status_code == 200 and response.content_type == kind
    for name in ("../app.py", "..%2fapp.py", "page.py", "%2e%2e/app.py", "x" * 5000):
        response = client.get(f"/page/{name}")
        assert response.status_code == 404 and response.json["error"]["message"]


def test_the_page_is_alone(client: FlaskClient) -> None:
    """No address of another host, nothing inline."""
    for name in KINDS:
        text = client.get(f"/page/{name}").text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text
    page = client.get("/").text
    assert "<style" not in page and " style=" not in page and " onclick" not in page
    assert page.count("<script") == page.count('<script type="module" src="/page/')
