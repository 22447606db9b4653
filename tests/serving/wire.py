"""Talking to a server over real sockets, for the tests."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit


def call(
    url: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or bytes, headers). body: bytes are sent as they are, others as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        data = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        if found.get("content-type", "").startswith("application/json"):
            return response.status, json.loads(data), found
        return response.status, data, found
    finally:
        connection.close()


class Stream:
    """A streaming completion; iterate over its chunks, or ``close`` in the middle."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        data = json.dumps({**body, "stream": True})
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", data, headers)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = self._response.headers
        self.finished = False

    def rest(self) -> bytes:
        try:
            return self._response.read()
        finally:
            self.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._response:
            if line.startswith(b"data: [DONE]"):
                self.finished = True
                self.close()
                return
            elif line.startswith(b"data: "):
                yield json.loads(line[6:])

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
