"""The HTTP server: waitress around the application, with a clean start and end."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server

from mtk.errors import ConfigError, Problem
from serving.app import service_of
from serving.channel import JsonChannel, Sweeper

# Threads beyond those that generate: health, metrics, and refusals while all are busy.
SPARE_THREADS = 8
# Seconds after which a silent connection without a request is closed.
IDLE_TIMEOUT = 120
# Bytes of an answer that may wait for a slow reader before its thread waits as well.
MAX_UNSENT = 1 << 20


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError if the port is taken or the host is not ours."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError([Problem("listen.host", host, f"is not an address ({error})")]) from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Two servers that start at once both bind; only one of them can listen.
        listener.listen()
    except OSError as error:
        listener.close()
        rule = f"cannot be listened on: {os.strerror(error.errno or 0)}"
        fix = "Choose another with --port, or 0 for a free one."
        raise ConfigError([Problem("listen.port", f"{host}:{port}", rule, fix)]) from None
    return listener


class HttpServer:
    """An application on a bound socket. url: where it answers, with the real port."""

    def __init__(self, app: Flask, listener: socket.socket, *, drain_timeout: float = 30.0) -> None:
        service = service_of(app)
        self._service, self._drain_timeout = service, drain_timeout
        self._map: dict[int, Any] = {}
        concurrency = service.settings.max_concurrency
        self._server = create_server(
            app,
            map=self._map,
            sockets=[listener],
            threads=concurrency + SPARE_THREADS,
            connection_limit=connection_limit(concurrency),
            # Flask refuses what is larger than the setting; this bounds what is read at all.
            max_request_body_size=8 * service.settings.max_body_bytes,
            channel_timeout=IDLE_TIMEOUT,
            outbuf_high_watermark=MAX_UNSENT,
            # Looking ahead is what notices that a client has gone while it waits.
            channel_request_lookahead=1,
            clear_untrusted_proxy_headers=True,
            ident="mtk",
        )
        self._server.channel_class = JsonChannel
        self._sweeper = Sweeper(
            read_timeout=service.settings.read_timeout,
            write_timeout=service.settings.write_timeout,
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}"
        # Plain flags: an Event has a lock, which a signal inside a signal handler's own
        # call would wait for without end.
        self._stop = self._abort = False

    def stop(self) -> None:
        """Drain and end; called a second time, end at once. Safe in a signal handler."""
        self._abort = self._stop
        self._stop = True

    def run(self) -> None:
        """Answer requests until :meth:`stop`; then let running ones end, and close."""
        while not self._stop:
            self._poll()
        self._drain()
        self._server.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(self._map)

    def _drain(self) -> None:
        """New generation requests get 503 while those in flight may end."""
        self._service.drain()
        deadline = time.monotonic() + self._drain_timeout
        while self._busy() and time.monotonic() < deadline and not self._abort:
            self._poll()
        # What still runs now ends with an error that is still delivered.
        self._service.engine.close(timeout=5.0)
        deadline = time.monotonic() + 2.0
        while self._busy() and time.monotonic() < deadline:
            self._poll()

    def _busy(self) -> bool:
        if self._service.in_flight:
            return True
        channels = list(self._server.active_channels.values())
        return any(channel.requests or channel.total_outbufs_len for channel in channels)

    def _poll(self) -> None:
        wasyncore.loop(timeout=0.1, map=self._map, use_poll=True, count=1)
        self._sweeper.sweep(self._server.active_channels.values())


def connection_limit(concurrency: int) -> int:
    """Sockets that may be open: idle and slow ones cost no thread, only a descriptor."""
    wanted = max(1000, 4 * concurrency)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft - 64))


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call ``stop`` inside the block."""

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop()

    before = {each: signal.signal(each, handle) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def check_ready_file(path: str | None) -> None:
    """Raises ConfigError for a path that :func:`ready_file` could not write."""
    if path is None:
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        rule = "cannot be written: it must be a file in a folder that exists and is yours"
        raise ConfigError([Problem("listen.ready_file", path, rule)])


@contextmanager
def ready_file(path: str | None, url: str) -> Iterator[None]:
    """``path`` holds the URL while the block runs."""
    if path is None:
        yield
        return
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(f"{url}\n", encoding="utf-8")
    temporary.replace(target)
    try:
        yield
    finally:
        with suppress(OSError):
            target.unlink()


def quiet_waitress() -> None:
    """Its warnings about a growing queue of tasks are ours to tell, by 429 and /metrics."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


def read_keys(path: str | None) -> frozenset[str]:
    """Keys from a file, one a line.

    Raises ConfigError if it cannot be read, holds none, or has a line of several words:
    were each a key, the words of a comment would let anybody in.
    """
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        rule = f"cannot be read ({error})"
        raise ConfigError([Problem("listen.api_key_file", path, rule)]) from error
    for number, line in enumerate(lines, start=1):
        if len(line.split()) > 1:
            rule = f"has several words in line {number}: write one key a line, no comments"
            raise ConfigError([Problem("listen.api_key_file", path, rule)])
    keys = frozenset(line.strip() for line in lines if line.strip())
    if not keys:
        rule = "holds no key: write one a line"
        raise ConfigError([Problem("listen.api_key_file", path, rule)])
    return keys
