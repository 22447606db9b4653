"""Hundreds of bad requests over real sockets: each a 4xx that a program can read, and the engine
never hears of any."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.engine import Ticket
from serving.requests import GenerationRequest
from serving.torch_engine import TorchEngine
from tests.serving import test_chat_api, test_megatron_api, test_openai_api
from tests.serving.conftest import settings
from tests.serving.models import ByteTokenizer
from tests.serving.wire import call

MakeEngine = Callable[..., TorchEngine]
Serve = Callable[..., str]
POSTS = ("/api", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
Case = tuple[str, str, Any, dict[str, str]]


def raw(path: str, data: bytes, kind: str = "application/json") -> Case:
    return "POST", path, data, {"Content-Type": kind}


def fields() -> Iterator[Case]:
    """One wrong field at a time."""
    for path, base, bad in (
        ("/api", test_megatron_api.BASE, test_megatron_api.BAD),
        ("/v1/completions", test_openai_api.BASE, test_openai_api.BAD),
        ("/v1/chat/completions", test_chat_api.BASE, test_chat_api.BAD),
    ):
        for param, changes in bad:
            merged: dict[str, Any] = {**base, **changes}
            body = {name: value for name, value in merged.items() if value is not ...}
            yield "POST", path, body, {}
            if path != "/api" and param != "stream_options":
                yield "POST", path, {**body, "stream": body.get("stream", True)}, {}


def bodies() -> Iterator[Case]:
    """What is no request at all, for every route that takes one."""
    deep = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for path in POSTS:
        for data in (
            b"", b"{", b"[]", b"null", b"1", b'"text"', b"{'a': 1}", b"\xff\xfe\x00",
            b'{"prompt": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}", b'{"prompt": NaN}',
            b'{"prompt": Infinity}', b'{"prompt": 1e999}', b'{"n": ' + b"9" * 5000 + b"}", deep,
            b'{"a":' * 50_000, b"{}", b'{"prompt": "a", "prompt": 1}',
        ):  # fmt: skip
            yield raw(path, data)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            yield raw(path, b'{"prompt": "a"}', kind)
        yield raw(path, b'{"prompt": "' + b"a" * 3_000_000 + b'"}')


def verbs() -> Iterator[Case]:
    for path in POSTS:
        for method in ("GET", "DELETE", "PATCH", *(("PUT",) if path != "/api" else ())):
            yield method, path, None, {}
    for path in ("/", "/health", "/livez", "/readyz", "/metrics", "/v1/models", "/openapi.json"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            yield method, path, None, {}
    for path in ("/v1", "/v1/nothing", "/v1/models/other", "/page/other", "/generate", "/api/x"):
        yield "GET", path, None, {}
        yield "POST", path, {}, {}


CASES = [*fields(), *bodies(), *verbs()]


class Watched(TorchEngine):
    """An engine that remembers what it was given."""

    def __init__(self, *args: Any, **values: Any) -> None:
        self.asked: list[GenerationRequest] = []
        super().__init__(*args, **values)

    def submit(self, request: GenerationRequest) -> Ticket:
        ticket = super().submit(request)
        self.asked.append(request)
        return ticket


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, make_engine: MakeEngine) -> Watched:
    monkeypatch.setattr("tests.serving.conftest.TorchEngine", Watched)
    made = make_engine()
    assert isinstance(made, Watched)
    return made


def test_all_are_refused_and_the_engine_is_untouched(engine: Watched, serve: Serve) -> None:
    chat = open_chat("plain", ByteTokenizer(), "tiny")
    url = serve(create_app(engine, settings(chat=chat)))
    assert len(CASES) >= 400
    for method, path, body, headers in CASES:
        status, answer, found = call(url, method, path, body, headers)
        shown = (method, path, str(body)[:120], status)
        assert 400 <= status < 500, shown
        assert found["content-type"] == "application/json", shown
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}, shown
        assert error["code"] == status and error["message"] and "Traceback" not in str(error)
        assert len(error["message"]) < 1000, shown
    assert engine.asked == []
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cached_tokens) == (0, 0, 0)
    status, answer, _ = call(url, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})
    assert status == 200 and len(engine.asked) == 1


def test_a_body_of_100_mb_is_not_read(engine: Watched, serve: Serve) -> None:
    """Refused by its length, or cut off where it does not say how long it is."""
    url = serve(create_app(engine, settings()))
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    head = b"PUT /api HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
    for kind, part in ((b"Content-Length: 104857600", b"a" * 0x100000),
                       (b"Transfer-Encoding: chunked", chunk)):  # fmt: skip
        with socket.create_connection(address, 10) as connection:
            connection.sendall(head + kind + b"\r\n\r\n")
            sent, answer = 0, b""
            try:
                while sent < 100:
                    connection.sendall(part)
                    sent += 1
                    connection.settimeout(0.001)
                    try:
                        answer += connection.recv(65536)
                        break
                    except TimeoutError:
                        connection.settimeout(10)
            except ConnectionError:
                assert sent < 100  # closed while we were sending: the answer may be lost
            if answer:
                assert answer.split()[1] == b"413", answer
                assert json.loads(answer.partition(b"\r\n\r\n")[2] or b'{"error": 1}')["error"]
            assert sent < 40
    assert engine.asked == [] and call(url, "GET", "/readyz")[0] == 200
