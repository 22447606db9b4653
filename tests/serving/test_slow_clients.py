"""Clients that send or read slowly, and engines that hang: all of it has an end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from serving.app import create_app, service_of
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.faults import failing_tick, gate_of_ticks
from tests.serving.wire import Stream, call, eventually

MakeEngine = Callable[..., TorchEngine]
Serve = Callable[..., str]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

# One letter a token, never the end of the document.
ENDLESS = {"prompt": "Hello", "stream": True, "logit_bias": {"65": 100}}


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


@pytest.mark.parametrize("sent", [b"", b"Content-Length: 50\r\n\r\n{"])
def test_a_request_that_never_ends_is_408(
    make_engine: MakeEngine, serve: Serve, sent: bytes
) -> None:
    """Also if a byte comes now and then, which keeps other servers' timeouts away."""
    url = serve(create_app(make_engine(), settings(read_timeout=0.6)))
    with connect(url) as connection:
        connection.sendall(HEAD + sent)
        began = time.monotonic()
        for _ in range(4):
            time.sleep(0.1)
            connection.sendall(b" ")
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert 0.5 < time.monotonic() - began < 3
    assert head.startswith(b"HTTP/1.1 408") or head.startswith(b"HTTP/1.0 408"), head
    error = json.loads(body)["error"]
    assert error["type"] == "request_timeout" and "read_timeout" in error["message"]
    assert call(url, "GET", "/livez")[0] == 200


def test_a_slow_but_timely_request_is_answered(make_engine: MakeEngine, serve: Serve) -> None:
    url = serve(create_app(make_engine(), settings(read_timeout=5.0)))
    data = b'{"prompt": "Hello", "max_tokens": 2}'
    with connect(url) as connection:
        connection.sendall(HEAD + b"Connection: close\r\n")
        for part in (b"Content-Length: %d\r\n\r\n" % len(data), data[:9], data[9:]):
            time.sleep(0.2)
            connection.sendall(part)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_idle_keep_alive_connections_are_not_cut_off(make_engine: MakeEngine, serve: Serve) -> None:
    url = serve(create_app(make_engine(), settings(read_timeout=0.3, write_timeout=0.3)))
    with connect(url) as connection:
        for _ in range(3):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while b"live" not in answer:
                part = connection.recv(65536)
                assert part, answer
                answer += part
            time.sleep(0.6)


def test_an_answer_that_nobody_reads_is_given_up(
    make_engine: MakeEngine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that waits for room is freed, and so are the slot and the engine's row."""
    monkeypatch.setattr("serving.server.MAX_UNSENT", 20_000)
    # Each event is large, so that a few dozen fill the sockets' buffers.
    monkeypatch.setattr("serving.sse.event", lambda data: b"data: {}" + b" " * 200_000 + b"\n\n")
    engine = make_engine()
    app = create_app(engine, settings(write_timeout=1.0, max_concurrency=1))
    url = serve(app)
    service = service_of(app)
    body = json.dumps({**ENDLESS, "max_tokens": 80}).encode()
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: service.in_flight == 1)
        time.sleep(0.5)
        assert service.in_flight == 1
        assert call(url, "POST", "/v1/completions", {"prompt": "a"})[0] == 429
        assert eventually(lambda: service.in_flight == 0, 6.0)
    assert engine.stats().running == 0
    assert call(url, "POST", "/v1/completions", {"prompt": "a"})[0] == 200


def test_a_slow_reader_that_reads_gets_all(
    make_engine: MakeEngine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.server.MAX_UNSENT", 20_000)
    monkeypatch.setattr("serving.sse.event", lambda data: b"data: {}" + b" " * 50_000 + b"\n\n")
    url = serve(create_app(make_engine(), settings(write_timeout=1.0)))
    body = json.dumps({**ENDLESS, "max_tokens": 60}).encode()
    received = b""
    with connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(
            HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        began = time.monotonic()
        while part := connection.recv(60_000):
            received += part
            time.sleep(0.03)
    assert time.monotonic() - began > 1.2
    assert received.count(b"data: {}") == 60 and b"data: [DONE]" in received[-100:]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is set, the engine hangs."""
    closed = gate_of_ticks(monkeypatch)
    yield closed
    closed.clear()


def test_an_engine_that_hangs_is_red_within_5_seconds(
    make_engine: MakeEngine, serve: Serve, gate: threading.Event
) -> None:
    engine = make_engine()
    url = serve(create_app(engine, settings(request_timeout=20.0)))
    stream = Stream(url, {"prompt": "Hello", "max_tokens": 60})
    next(iter(stream))
    gate.set()
    began = time.monotonic()
    assert eventually(lambda: call(url, "GET", "/readyz")[0] == 503, 6.0)
    assert time.monotonic() - began <= 5.0
    assert call(url, "GET", "/livez")[0] == 200
    # Many who ask for its health at once do not take the threads away from others.
    askers = [
        threading.Thread(target=call, args=(url, "GET", "/health"), daemon=True) for _ in range(60)
    ]
    for asker in askers:
        asker.start()
    asked = time.monotonic()
    assert call(url, "GET", "/v1/models")[0] == 200
    assert time.monotonic() - asked < 1.0
    gate.clear()
    assert eventually(lambda: call(url, "GET", "/readyz")[0] == 200)
    stream.close()
    for asker in askers:
        asker.join(10)


def test_clients_of_an_engine_that_hangs_get_an_error(
    make_engine: MakeEngine, serve: Serve, gate: threading.Event
) -> None:
    url = serve(create_app(make_engine(), settings(request_timeout=0.8)))
    gate.set()
    began = time.monotonic()
    status, answer, _ = call(url, "POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 9})
    assert status == 504 and answer["error"]["message"]
    assert time.monotonic() - began < 3
    events = list(Stream(url, {"prompt": "Hello", "max_tokens": 9}))
    assert events[-1]["error"]["code"] == 504
    gate.clear()


def test_an_engine_that_dies_is_red_at_once(
    make_engine: MakeEngine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that wait get an error, whether they stream, wait for a row, or for the whole."""
    engine = make_engine(max_batch_size=2)
    url = serve(create_app(engine, settings()))

    failing_tick(monkeypatch, after=0.3)
    found: list[int] = []

    def ask(stream: bool) -> None:
        body = {"prompt": "Hello", "max_tokens": 50}
        if stream:
            opened = Stream(url, body)
            events = list(opened) if opened.status == 200 else []
            found.append(events[-1]["error"]["code"] if events else opened.status)
        else:
            found.append(call(url, "POST", "/v1/completions", body)[0])

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(10)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [503] * 10
    assert call(url, "GET", "/readyz")[0] == 503
    assert time.monotonic() - began < 5
