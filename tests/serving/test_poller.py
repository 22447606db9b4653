"""The loop of sockets: idle connections cost nothing, and none is forgotten."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from serving.app import create_app
from serving.channel import JsonChannel
from serving.poller import Poller
from serving.server import HttpServer, bind
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.wire import call, eventually

MakeEngine = Callable[..., TorchEngine]
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def server(make_engine: MakeEngine) -> Iterator[HttpServer]:
    made = HttpServer(create_app(make_engine(), settings()), bind("127.0.0.1", 0))
    yield made
    made.stop()
    made.run()  # ends at once, and closes all


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), 10)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[JsonChannel]]:
    """Connections that were asked whether they want to read."""
    found: list[JsonChannel] = []
    real = JsonChannel.readable

    def readable(channel: JsonChannel) -> bool:
        found.append(channel)
        return bool(real(channel))

    monkeypatch.setattr(JsonChannel, "readable", readable)
    yield found


def test_silent_connections_are_not_asked(
    server: HttpServer, asked: list[JsonChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.poller.SCAN_EVERY", 1e9)
    clients = [connect(server) for _ in range(50)]
    for client in clients:
        client.sendall(b"GET /li")
    channels = server._server.active_channels
    assert eventually(
        lambda: (
            _turned(server._poller) and sum(c.request is not None for c in channels.values()) == 50
        )
    )
    server._poller.turn(0.01)
    asked.clear()
    clients[7].sendall(b"vez")
    for _ in range(20):
        server._poller.turn(0.001)
    assert 1 <= len(asked) <= 3 and len(set(asked)) == 1
    for client in clients:
        client.close()
    assert eventually(lambda: _turned(server._poller) and not channels)


def test_answers_do_not_wait_for_a_scan(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change that a thread makes is seen at once, over many requests of one connection and
    many connections of one descriptor."""
    monkeypatch.setattr("serving.poller.SCAN_EVERY", 1e9)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        with connect(server) as client:
            client.settimeout(5)
            for _ in range(200):
                client.sendall(GET)
                answer = b""
                while b"live" not in answer:
                    answer += client.recv(65536)
            # Two at once: the second waits for the end of the first.
            client.sendall(GET + GET)
            answer = b""
            while answer.count(b"live") < 2:
                answer += client.recv(65536)
        for _ in range(100):
            assert call(server.url, "GET", "/livez")[0] == 200
    finally:
        server.stop()
        thread.join(20)
    assert not thread.is_alive()


def test_what_time_changes_is_seen_by_the_scan(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.poller.SCAN_EVERY", 0.05)
    with connect(server) as client:
        assert eventually(lambda: _turned(server._poller) and bool(server._server.active_channels))
        (channel,) = server._server.active_channels.values()
        channel.will_close = True
        assert eventually(lambda: _turned(server._poller) and not server._server.active_channels)
        assert client.recv(10) == b""


def _turned(poller: Poller) -> bool:
    poller.turn(0.01)
    return True
