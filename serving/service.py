"""What all generating routes share: admission, waiting, disconnects, time limits, figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flask import g, has_request_context, request

from mtk.errors import ServingError
from serving.engine import Engine, Health, Ticket
from serving.errors import NotReadyError, OverloadedError
from serving.grammar import JsonGrammars
from serving.metrics import Metrics
from serving.requests import Delta, GenerationRequest, SequenceOutput
from serving.settings import ServerSettings

# How often (seconds) a waiting request looks whether its client is still there.
LOOK_EVERY = 0.1


@dataclass
class _Flight:
    """Generation requests that are being answered."""

    count: int = 0
    draining: bool = False


class Service:
    """An engine as the routes use it."""

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.grammars = JsonGrammars(engine.tokenizer, engine.vocab_size)
        self._probing, self._last_health = threading.Lock(), Health(True)
        self._flight, self._changed = _Flight(), threading.Condition()

    @property
    def in_flight(self) -> int:
        return self._flight.count

    @property
    def draining(self) -> bool:
        return self._flight.draining

    def drain(self) -> None:
        """Refuse new generation requests from now on."""
        with self._changed:
            self._flight.draining = True

    def note(self, *, quiet: bool) -> None:
        """Whether this request asks not to be logged (Megatron's ``no_log``)."""
        g.quiet = quiet

    def health(self) -> Health:
        """Whether the engine decodes. One caller asks the engine; those who come meanwhile get
        the last answer, so that an engine that hangs does not hang all threads."""
        if not self._probing.acquire(blocking=False):
            return self._last_health
        try:
            self._last_health = self.engine.probe(self.settings.probe_timeout)
            return self._last_health
        finally:
            self._probing.release()

    def answer(self, asked: GenerationRequest) -> list[SequenceOutput]:
        """Submit and wait for the end. Raises ServingError, also when the client has gone."""
        with self._slot():
            ticket = self.engine.submit(asked)
            with self._watched(ticket) as still_wanted:
                while not ticket.wait(LOOK_EVERY):
                    still_wanted()
                return ticket.outputs()

    def stream(self, asked: GenerationRequest) -> DeltaStream:
        """Deltas of a request; None about every ``LOOK_EVERY`` seconds without one.

        The request is submitted before this returns, so that refusals are still plain
        HTTP errors. Closing the iterator cancels the request.
        """
        release = self._take_slot()
        try:
            ticket = self.engine.submit(asked)
        except BaseException:
            release()
            raise
        gone = _disconnected()
        return DeltaStream(self._deltas(ticket, gone), ticket, release)

    def _deltas(self, ticket: Ticket, gone: Callable[[], bool]) -> Iterator[Delta | None]:
        deadline = ticket.submitted + self.settings.request_timeout
        for delta in ticket.deltas(LOOK_EVERY):
            _look(gone, deadline)
            yield delta

    @contextmanager
    def _watched(self, ticket: Ticket) -> Iterator[Callable[[], None]]:
        gone, deadline = _disconnected(), ticket.submitted + self.settings.request_timeout
        try:
            yield lambda: _look(gone, deadline)
        finally:
            ticket.cancel()

    @contextmanager
    def _slot(self) -> Iterator[None]:
        release = self._take_slot()
        try:
            yield
        finally:
            release()

    def _take_slot(self) -> Callable[[], None]:
        with self._changed:
            if self._flight.draining:
                raise NotReadyError("the server is stopping")
            if self._flight.count >= self.settings.max_concurrency:
                raise OverloadedError(
                    f"{self._flight.count} requests are being answered "
                    f"(max_concurrency = {self.settings.max_concurrency})"
                )
            self._flight.count += 1
        return _Once(self._give_back)

    def _give_back(self) -> None:
        with self._changed:
            self._flight.count -= 1
            self._changed.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no request is in flight; whether that came."""
        with self._changed:
            return self._changed.wait_for(lambda: self._flight.count == 0, timeout)


class _Once:
    """Calls a function the first time it is called."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


class DeltaStream(Iterator["Delta | None"]):
    """Deltas whose end, however it comes, frees the engine and the slot.

    A class and not a generator: closing a generator that was never started runs nothing.
    """

    def __init__(
        self, deltas: Iterator[Delta | None], ticket: Ticket, release: Callable[[], None]
    ) -> None:
        self._deltas, self._ticket, self._release = deltas, ticket, release

    def __next__(self) -> Delta | None:
        try:
            return next(self._deltas)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._ticket.cancel()
        self._release()


def _look(gone: Callable[[], bool], deadline: float) -> None:
    if gone():
        raise ClientGoneError
    if time.monotonic() > deadline:
        raise ServingError("the request took longer than the server allows", status=504)


class ClientGoneError(ServingError):
    """Nobody reads the answer any more."""

    def __init__(self) -> None:
        super().__init__("the client closed the connection", status=499)


def _disconnected() -> Callable[[], bool]:
    """waitress tells whether the socket was closed; other servers only at the next write."""
    if not has_request_context():
        return lambda: False
    check: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return check
