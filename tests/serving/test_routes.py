"""Everything beside generation, errors of HTTP, and a storm of malformed requests."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from flask.testing import FlaskClient

from serving.app import create_app
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.wire import call

MakeEngine = Callable[..., TorchEngine]
Serve = Callable[..., str]


def test_health(client: FlaskClient) -> None:
    for path in ("/health", "/readyz"):
        response = client.get(path)
        assert response.status_code == 200 and response.json["ready"]
    assert client.get("/livez").status_code == 200


def test_models(client: FlaskClient) -> None:
    (model,) = client.get("/v1/models").json["data"]
    assert model["id"] == "tiny" and model["max_model_len"] == 96
    assert client.get("/v1/models/tiny").json == model
    assert client.get("/v1/models/other").status_code == 404


def test_lineage(client: FlaskClient, make_engine: MakeEngine) -> None:
    assert client.get("/v1/lineage").json["digest"] == "d"
    without = create_app(make_engine(), settings(lineage=None)).test_client()
    assert without.get("/v1/lineage").status_code == 404


def test_tokenizer_routes(client: FlaskClient) -> None:
    body = client.post("/tokenize", json={"prompt": "é!"}).json
    assert body == {"tokens": [195, 169, 33], "count": 3, "max_model_len": 96}
    assert client.post("/detokenize", json={"tokens": body["tokens"]}).json == {"prompt": "é!"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/tokenize", {"text": "a"}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [257]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": [[1]]}),
    ],
)
def test_bad_tokenizer_requests(client: FlaskClient, path: str, body: Any) -> None:
    response = client.post(path, json=body)
    assert response.status_code in (400, 404) and response.json["error"]["param"]


def test_metrics_count(make_engine: MakeEngine) -> None:
    client = create_app(make_engine(), settings()).test_client()
    client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4}).close()
    client.put("/api", json={}).close()
    client.open("/nothing", method="BREW").close()
    response = client.get("/metrics")
    assert response.content_type.startswith("text/plain")
    text = response.text
    for line in (
        'mtk_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0',
        'mtk_http_requests_total{method="PUT",route="/api",status="400"} 1.0',
        'mtk_http_requests_total{method="other",route="unmatched",status="404"} 1.0',
        "mtk_prompt_tokens_total 5.0",
        "mtk_generated_tokens_total 4.0",
        "mtk_time_to_first_token_seconds_count 1.0",
        "mtk_inter_token_seconds_count 3.0",
        'mtk_sequences_finished_total{reason="length"} 1.0',
        "mtk_sequences_running 0.0",
        "mtk_requests_waiting 0.0",
    ):
        assert line in text, line


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api", 405),
        ("DELETE", "/api", 405),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/embeddings", 404),
    ],
)
def test_wrong_verbs_and_routes(client: FlaskClient, method: str, path: str, status: int) -> None:
    response = client.open(path, method=method)
    assert response.status_code == status
    assert response.json["error"]["code"] == status
    if status == 405:
        assert response.headers["Allow"]


@pytest.mark.parametrize(
    ("data", "kind", "status", "words"),
    [
        (b"{}", "text/plain", 415, "application/json"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "application/json"),
        (b"{}", "", 415, "absent"),
        (b"", "application/json", 400, "not JSON"),
        (b"{", "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "a list"),
        (b"null", "application/json", 400, "null"),
        (b"\xff\xfe", "application/json", 400, "UTF-8"),
        (b'{"prompts": ["a"], "temperature": NaN}', "application/json", 400, "NaN"),
        (b'{"prompts": ["a"], "temperature": -Infinity}', "application/json", 400, "Infinity"),
        (b'{"prompts": ["a"], "temperature": 1e999}', "application/json", 400, "inf"),
        (b"[" * 200_000, "application/json", 400, "deep"),
        (b'{"a":' * 100_000, "application/json", 400, "deep"),
        (b'{"prompts": ["a"], "top_k": ' + b"9" * 5000 + b"}", "application/json", 400, ""),
        (b'{"prompts": "' + b"a" * 3_000_000 + b'"}', "application/json", 413, ""),
        (b'{"\xe2\x82": 1}', "application/json", 400, "UTF-8"),
        (b'{"prompts": ["\\ud800"]}', "application/json", 400, "surrogate"),
    ],
)
@pytest.mark.parametrize("path", ["/api", "/v1/completions"])
def test_malformed_bodies(
    client: FlaskClient, path: str, data: bytes, kind: str, status: int, words: str
) -> None:
    response = client.post(path, data=data, content_type=kind)
    if path == "/api" or status != 400:
        assert response.status_code == status
        assert words in response.json["error"]["message"]
    assert 400 <= response.status_code < 500
    assert "Traceback" not in response.text


def test_internal_errors_show_nothing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    client = create_app(make_engine(), settings(log=said.append)).test_client()

    def fault(*args: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("serving.megatron_api.answer", fault)
    response = client.put("/api", json={"prompts": ["a"]})
    assert response.status_code == 500 and "secret" not in response.text
    assert any("secret" in line for line in said)


def test_no_log_keeps_a_request_out_of_the_log(make_engine: MakeEngine) -> None:
    said: list[str] = []
    client = create_app(make_engine(), settings(log=said.append)).test_client()
    body = {"prompts": ["a"], "tokens_to_generate": 1}
    client.put("/api", json={**body, "no_log": True}).close()
    assert said == []
    client.put("/api", json=body).close()
    assert len(said) == 1 and "PUT /api 200" in said[0]


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 1.5, 1e308, -1e-308, 2**31, 2**63, 10**40, "", "a", "\u0000",
    "\ud800", "é" * 50, [], [1], ["a"], [None], [[]], [[1, 2]], [[[1]]], {}, {"a": 1}, [{}],
    ["a", 1], ["a"] * 200, [0] * 200, "x" * 5000,
]  # fmt: skip


def test_a_storm_of_bad_requests(make_engine: MakeEngine, serve: Serve) -> None:
    """Random fields with random values: only 2xx and 4xx, and the engine is untouched."""
    from serving import megatron_api, openai_api

    engine = make_engine()
    url = serve(create_app(engine, settings()))
    source, seen = random.Random(7), set()
    for number in range(400):
        path, fields, base = (
            ("/api", megatron_api.FIELDS, {"prompts": ["a"], "tokens_to_generate": 1}),
            ("/v1/completions", openai_api.FIELDS, {"prompt": "a", "max_tokens": 1}),
        )[number % 2]
        body: dict[str, Any] = dict(base) if source.random() < 0.8 else {}
        for _ in range(source.randint(1, 3)):
            body[source.choice(fields)] = source.choice(VALUES)
        status, answer, _ = call(url, "POST", path, body)
        assert 200 <= status < 300 or 400 <= status < 500, (body, answer)
        seen.add(status)
    data = json.dumps({"prompts": ["a"], "tokens_to_generate": 1}).encode()
    for _ in range(100):
        broken = bytearray(data)
        for _ in range(source.randint(1, 4)):
            broken[source.randrange(len(broken))] = source.randrange(256)
        status, answer, _ = call(url, "PUT", "/api", bytes(broken))
        assert status == 200 or 400 <= status < 500, (broken, answer)
    assert {200, 400} <= seen
    assert engine.thread_alive and call(url, "GET", "/readyz")[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"PUT /api HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"PUT /api HTTP/1.1\r\nContent-Length: 100000000\r\nHost: x\r\n\r\n",
        b"PUT /api HTTP/1.1\r\nTransfer-Encoding: nonsense\r\n\r\n",
    ],
)
def test_malformed_http_is_answered_in_json(
    make_engine: MakeEngine, serve: Serve, sent: bytes
) -> None:
    url = serve(create_app(make_engine(), settings()))
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10) as connection:
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1][:1] in (b"4", b"5") and b"application/json" in head
    assert json.loads(body)["error"]["message"]
    assert call(url, "GET", "/livez")[0] == 200


def test_an_endless_header_is_cut_off(make_engine: MakeEngine, serve: Serve) -> None:
    url = serve(create_app(make_engine(), settings()))
    port = int(url.rsplit(":", 1)[1])
    # The answer may be lost: the server closes while the client is still sending.
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"GET /" + b"a" * 1_000_000)
        assert client.recv(65536).split()[1] in (b"431", b"400")
    assert call(url, "GET", "/livez")[0] == 200
