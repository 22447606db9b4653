"""Over real sockets: streaming, disconnects, limits, keys, health, errors, draining."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from mtk.errors import ConfigError
from serving.app import create_app, service_of
from serving.paged.runner import Runner
from serving.server import HttpServer, bind, read_keys
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.models import ByteTokenizer, greedy_without_cache, tiny_model
from tests.serving.wire import Stream, call, eventually

MakeEngine = Callable[..., TorchEngine]
Serve = Callable[..., str]
GREEDY = {"prompt": "Hello", "temperature": 0}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode step takes 20 ms."""
    real = Runner.decode

    def decode(runner: Runner, rows: Any) -> Any:
        time.sleep(0.02)
        return real(runner, rows)

    monkeypatch.setattr(Runner, "decode", decode)


def greedy_text(prompt: str, count: int) -> str:
    return ByteTokenizer().decode(greedy_without_cache(tiny_model(), prompt.encode(), count))


def test_streaming(make_engine: MakeEngine, serve: Serve) -> None:
    url = serve(create_app(make_engine(), settings()))
    stream = Stream(
        url, {**GREEDY, "max_tokens": 30, "stream_options": {"include_usage": True}, "n": 2}
    )
    assert stream.status == 200
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert stream.headers["Cache-Control"] == "no-cache"
    chunks = list(stream)
    assert stream.finished
    assert len({chunk["id"] for chunk in chunks}) == 1
    *steps, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 60
    for index in (0, 1):
        mine = [s["choices"][0] for s in steps if s["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == greedy_text("Hello", 30)
        assert [choice["finish_reason"] for choice in mine][-1] == "length"
        assert {choice["finish_reason"] for choice in mine[:-1]} <= {None}


def test_a_stream_arrives_step_by_step(make_engine: MakeEngine, serve: Serve, slow: None) -> None:
    url = serve(create_app(make_engine(), settings()))
    arrivals = [time.monotonic() for _ in Stream(url, {**GREEDY, "max_tokens": 25})]
    assert arrivals[-1] - arrivals[0] > 0.2


def test_streamed_echo_and_logprobs_equal_the_whole(make_engine: MakeEngine, serve: Serve) -> None:
    url = serve(create_app(make_engine(), settings()))
    body = {**GREEDY, "max_tokens": 5, "echo": True, "logprobs": 2}
    _, whole, _ = call(url, "POST", "/v1/completions", body)
    choice = whole["choices"][0]
    parts = [chunk["choices"][0] for chunk in Stream(url, body)]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name, values in choice["logprobs"].items():
        assert [v for part in parts for v in part["logprobs"][name]] == values


def test_bad_streaming_requests_are_plain_errors(make_engine: MakeEngine, serve: Serve) -> None:
    url = serve(create_app(make_engine(), settings()))
    stream = Stream(url, {**GREEDY, "max_tokens": 1000})
    assert stream.status == 400
    assert b"maximum context length" in stream.rest()


def test_concurrent_clients_get_their_own_text(make_engine: MakeEngine, serve: Serve) -> None:
    url = serve(create_app(make_engine(max_batch_size=4), settings()))

    def one(number: int) -> bool:
        prompt = f"client {number}"
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 20}
        if number % 2:
            text = "".join(chunk["choices"][0]["text"] for chunk in Stream(url, body))
        else:
            status, answer, _ = call(url, "POST", "/v1/completions", body)
            assert status == 200, answer
            text = answer["choices"][0]["text"]
        return text == greedy_text(prompt, 20)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(32)))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_disconnect_frees_the_slot(
    make_engine: MakeEngine, serve: Serve, slow: None, streaming: bool
) -> None:
    engine = make_engine(context=4096)
    engine._vocabulary.size = 256  # never the end of document
    monster = {**GREEDY, "max_tokens": 80}
    app = create_app(engine, settings())
    url = serve(app)
    service = service_of(app)
    if streaming:
        stream = Stream(url, monster)
        next(iter(stream))
        stream.close()
    else:
        connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        sent = b'{"prompt": "Hello", "max_tokens": 80}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        assert eventually(lambda: engine.stats().running == 1)
        connection.close()
    assert eventually(lambda: engine.stats().running == 0, 1.0)
    assert eventually(lambda: service.in_flight == 0, 1.0)
    assert engine.stats().cached_tokens == 0


def test_over_the_limits_is_429(make_engine: MakeEngine, serve: Serve, slow: None) -> None:
    engine = make_engine(max_batch_size=1, max_queue=1)
    url = serve(create_app(engine, settings(max_concurrency=3)))
    running = Stream(url, {**GREEDY, "max_tokens": 90})
    with ThreadPoolExecutor(1) as pool:
        # The headers of a stream come with its first token, so this one waits in the queue.
        waiting = pool.submit(Stream, url, {**GREEDY, "max_tokens": 90})
        assert eventually(lambda: engine.stats().waiting == 1)
        assert_refused(url)
        running.close()
        waiting.result().close()
    assert eventually(lambda: engine.stats().running == 0)
    assert call(url, "POST", "/v1/completions", GREEDY)[0] == 200


def assert_refused(url: str) -> None:
    for body in ({**GREEDY}, {**GREEDY, "stream": True}):
        status, answer, headers = call(url, "POST", "/v1/completions", body)
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert answer["error"]["type"] == "rate_limit_error"
    assert call(url, "GET", "/health")[0] == 200


def test_concurrency_is_limited(make_engine: MakeEngine, serve: Serve, slow: None) -> None:
    engine = make_engine(max_batch_size=8)
    url = serve(create_app(engine, settings(max_concurrency=2)))
    streams = [Stream(url, {**GREEDY, "max_tokens": 60}) for _ in range(2)]
    status, answer, _ = call(url, "PUT", "/api", {"prompts": ["a"]})
    assert status == 429 and "max_concurrency = 2" in answer["error"]["message"]
    assert call(url, "GET", "/readyz")[0] == 503
    assert call(url, "GET", "/health")[0] == 200
    for stream in streams:
        stream.close()
    assert eventually(lambda: call(url, "GET", "/readyz")[0] == 200)


def test_a_dead_engine_is_told(
    make_engine: MakeEngine, serve: Serve, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(create_app(make_engine(), settings()))
    stream = Stream(url, {**GREEDY, "max_tokens": 80})
    chunks = iter(stream)
    next(chunks)

    def fault(*args: Any) -> None:
        raise MemoryError("secret detail")

    monkeypatch.setattr(Runner, "decode", fault)
    *_, last = chunks
    assert last["error"]["code"] == 503 and "died" in last["error"]["message"]
    assert "secret" not in str(last)
    for path in ("/readyz", "/health"):
        status, body, _ = call(url, "GET", path)
        assert status == 503 and "died" in body["reason"]
    assert call(url, "GET", "/livez")[0] == 200
    status, body, headers = call(url, "PUT", "/api", {"prompts": ["a"]})
    assert status == 503 and "retry-after" in headers


def test_requests_that_take_too_long(make_engine: MakeEngine, serve: Serve, slow: None) -> None:
    engine = make_engine()
    url = serve(create_app(engine, settings(request_timeout=0.2)))
    body = {**GREEDY, "max_tokens": 80}
    assert call(url, "POST", "/v1/completions", body)[0] == 504
    assert eventually(lambda: engine.stats().running == 0)
    # A stream that never pauses long enough to look around ends as well.
    events = list(Stream(url, body))
    assert events[-1]["error"]["code"] == 504 and len(events) < 40
    assert eventually(lambda: engine.stats().running == 0)


def test_draining_lets_requests_end(make_engine: MakeEngine, slow: None) -> None:
    engine = make_engine()
    app = create_app(engine, settings())
    server = HttpServer(app, bind("127.0.0.1", 0), drain_timeout=20)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    stream = Stream(server.url, {**GREEDY, "max_tokens": 60})
    chunks = iter(stream)
    next(chunks)
    server.stop()
    assert eventually(lambda: service_of(app).draining)
    status, _, headers = call(server.url, "POST", "/v1/completions", GREEDY)
    assert status == 503 and "retry-after" in headers
    assert call(server.url, "GET", "/readyz")[0] == 503
    assert len(list(chunks)) > 10 and stream.finished
    thread.join(10)
    assert not thread.is_alive() and engine.died is None


def test_a_drain_that_takes_too_long_ends_with_an_error(
    make_engine: MakeEngine, slow: None
) -> None:
    engine = make_engine()
    server = HttpServer(create_app(engine, settings()), bind("127.0.0.1", 0), drain_timeout=0.1)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    stream = Stream(server.url, {**GREEDY, "max_tokens": 80})
    chunks = iter(stream)
    next(chunks)
    server.stop()
    *_, last = chunks
    assert "stopping" in last["error"]["message"] and not stream.finished
    thread.join(10)
    assert not thread.is_alive()


def test_a_taken_port_is_told() -> None:
    listener = bind("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match="--port"):
            bind("127.0.0.1", listener.getsockname()[1])
    finally:
        listener.close()
    with pytest.raises(ConfigError, match="not an address"):
        bind("no such host", 0)


@pytest.mark.parametrize("text", ["# production key\none\n", "one two\n", " \n"])
def test_key_files_hold_one_key_a_line(tmp_path: Path, text: str) -> None:
    """The words of a comment are no keys."""
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"one( key)? a line"):
        read_keys(str(path))
    path.write_text("one\n\n  two \r\n")
    assert read_keys(str(path)) == {"one", "two"}


def test_keys(make_engine: MakeEngine, serve: Serve) -> None:
    app: Flask = create_app(make_engine(), settings(api_keys=frozenset({"one", "zwö"})))
    url = serve(app)
    assert call(url, "GET", "/livez")[0] == 200
    for path in ("/health", "/metrics", "/v1/models", "/nothing"):
        status, body, _ = call(url, "GET", path)
        assert status == 401 and body["error"]["type"] == "authentication_error"
    for bad in ("Bearer two", "Basic one", "one", "Bearer", "Bearer one two"):
        status = call(url, "PUT", "/api", {"prompts": ["a"]}, {"Authorization": bad})[0]
        assert status == 401
    good = {"Authorization": "Bearer one"}
    assert call(url, "PUT", "/api", {"prompts": ["a"]}, good)[0] == 200
