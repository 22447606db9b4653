"""Connections that take too long to send a request or to read their answer.

waitress closes only connections without any traffic; one byte now and then keeps one open for
ever, and an answer that nobody reads keeps its thread. Both have a deadline here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import ErrorTask
from waitress.utilities import Error

from mtk.errors import ServingError
from serving.errors import error_body

# Seconds between two looks at all connections.
SWEEP_EVERY = 1.0


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress itself refuses (too large, not HTTP) is answered in JSON as well."""

    def execute(self) -> None:
        error = self.request.error
        problem = ServingError(f"{error.reason}: {error.body}", status=error.code)
        body = json.dumps(error_body(problem)).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _TooSlowError(Error):  # type: ignore[misc]
    code, reason = 408, "Request Timeout"


class JsonChannel(HTTPChannel):  # type: ignore[misc]
    """A connection that knows since when it waits for the rest of a request."""

    error_task_class = _JsonErrorTask
    request: Any  # what has come of the next request
    reading_since: float | None = None

    def received(self, data: bytes) -> Any:
        done = super().received(data)
        if self.request is None:
            self.reading_since = None
        elif self.reading_since is None:
            self.reading_since = time.monotonic()
        return done

    def refuse_rest(self, seconds: float) -> None:
        """Answer 408 in place of the request whose end did not come, and close."""
        with self.requests_lock:
            request, self.request, self.reading_since = self.request, None, None
            if request is None or self.requests:
                self.will_close = True
                return
            rule = f"the request was not complete after {seconds:g} seconds (read_timeout)"
            request.error = _TooSlowError(rule)
            request.completed = True
            self.requests.append(request)
        self.server.add_task(self)


class Sweeper:
    """Looks over all connections about once a second; in the thread of the sockets only."""

    def __init__(self, *, read_timeout: float, write_timeout: float) -> None:
        self._read, self._write = read_timeout, write_timeout
        self._next = 0.0
        # Connection -> (bytes last moved when, seen first with these when).
        self._unread: dict[JsonChannel, tuple[float, float]] = {}

    def sweep(self, channels: Iterable[JsonChannel]) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + min(SWEEP_EVERY, self._read / 4, self._write / 4)
        unread: dict[JsonChannel, tuple[float, float]] = {}
        for channel in list(channels):
            if channel.reading_since is not None and now - channel.reading_since > self._read:
                channel.refuse_rest(self._read)
            if channel.total_outbufs_len:
                moved = channel.last_activity
                before = self._unread.get(channel)
                since = before[1] if before is not None and before[0] == moved else now
                unread[channel] = (moved, since)
                if now - since > self._write:
                    # Not by will_close: that is looked at only when the socket takes bytes.
                    # It wakes the thread that waits for room, whose request is cancelled.
                    channel.handle_close()
        self._unread = unread
