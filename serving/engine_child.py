"""The engine's side of the connection: what the server asks for goes to the engine, and what a
step brought goes back in one message."""

from __future__ import annotations

import threading
import time
from typing import Any

from mtk.errors import ServingError
from serving.engine import EngineStats, Ticket
from serving.engine_messages import (
    Cancel,
    Close,
    Died,
    Line,
    Ping,
    Pong,
    Probe,
    Probed,
    Ready,
    Step,
    Submit,
    pack_delta,
    with_grammar,
)
from serving.errors import NotReadyError
from serving.grammar import JsonGrammars
from serving.requests import Delta, GenerationRequest, SequenceOutput
from serving.torch_engine import TorchEngine

# Figures alone, of requests that do not stream, are sent so many seconds apart at most.
FIGURES_EVERY = 0.05


class Relay:
    """Serves one connection; also the engine's observer.

    Deltas, outputs and figures are gathered by the engine's thread alone, which sends them after
    each of its steps.
    """

    def __init__(self, line: Line, engine: TorchEngine) -> None:
        self._line, self._engine = line, engine
        self._grammars = JsonGrammars(engine.tokenizer, engine.vocab_size)
        self._tickets: dict[int, RemoteTicket] = {}
        self._seen = 0
        self._deltas: list[tuple[int, tuple[Any, ...]]] = []
        self._outputs: list[tuple[int, tuple[SequenceOutput, ...], bool]] = []
        self._failures: list[tuple[int, ServingError]] = []
        self._figures: list[tuple[Any, ...]] = []
        self._sent_stats: EngineStats | None = None
        self._sent_at = 0.0

    def serve(self) -> None:
        """Until the other end closes, or asks for the engine's end."""
        self._engine.observe(self)
        self._engine.follow(self.flush)
        engine = self._engine
        self._line.send(Ready(engine.context, engine.vocab_size, engine.encoder))
        while True:
            try:
                messages = self._line.receive()
            except (EOFError, OSError):
                return  # nobody is there whom an answer could reach
            for message in messages:
                if isinstance(message, Close):
                    self._engine.close(message.timeout)
                    return
                self._handle(message)

    def _handle(self, message: Any) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            ticket = self._tickets.pop(message.number, None)
            if ticket is not None:
                ticket.cancel()
        elif isinstance(message, Probe):
            # In a thread of its own: who waits for a token must not keep others waiting.
            threading.Thread(target=self._probe, args=(message,), daemon=True).start()
        elif isinstance(message, Ping):
            self._line.send(Pong(*self._engine.progress()))

    def _submit(self, message: Submit) -> None:
        try:
            request = with_grammar(message.request, self._grammars)
            ticket = RemoteTicket(request, message, self)
            self._tickets[message.number] = ticket
            self._engine.take(ticket)
        except ServingError as error:
            failures = [(message.number, error)]
            self._line.send(Step((), (), failures, (), self._engine.stats(), message.number))
        self._seen = message.number

    def _probe(self, message: Probe) -> None:
        self._line.send(Probed(message.number, self._engine.probe(message.timeout)))

    # What follows runs in the engine's thread.

    def queued(self, seconds: float) -> None:
        self._figures.append(("queued", seconds))

    def prompt(self, tokens: int) -> None:
        self._figures.append(("prompt", tokens))

    def token(self, seconds: float, *, first: bool) -> None:
        self._figures.append(("token", seconds, first))

    def finished(self, reason: str) -> None:
        self._figures.append(("finished", reason))

    def push(self, number: int, delta: Delta) -> None:
        self._deltas.append((number, pack_delta(delta)))

    def complete(self, number: int, outputs: tuple[SequenceOutput, ...], last: bool) -> None:
        self._outputs.append((number, outputs, last))

    def fail(self, number: int, error: ServingError) -> None:
        self._failures.append((number, error))

    def forget(self, number: int) -> None:
        self._tickets.pop(number, None)

    def flush(self) -> None:
        """Send what has been gathered, if anybody waits for it."""
        seen, ended = self._seen, self._engine.ended
        stats, now = self._engine.stats(), time.monotonic()
        if ended is not None:
            # All who still wait get that error where it arrives, after the death is known there.
            self._failures = [f for f in self._failures if not isinstance(f[1], NotReadyError)]
        messages: list[Any] = []
        if self._urgent(stats) or (self._sent_stats != stats and now > self._sent_at):
            messages.append(
                Step(self._deltas, self._outputs, self._failures, self._figures, stats, seen)
            )
            self._clear()
            self._sent_stats, self._sent_at = stats, now + FIGURES_EVERY
        if ended is not None:
            messages.append(Died(ended, self._engine.died is not None))
        if messages:
            self._send(*messages)

    def _urgent(self, stats: EngineStats) -> bool:
        before = self._sent_stats
        if self._deltas or self._outputs or self._failures or before is None:
            return True
        return (before.running, before.waiting) != (stats.running, stats.waiting)

    def _clear(self) -> None:
        self._deltas, self._outputs, self._failures, self._figures = [], [], [], []

    def _send(self, *messages: Any) -> None:
        try:
            self._line.send(*messages)
        except OSError:
            return  # the server is gone; the receiving thread ends the process


class RemoteTicket(Ticket):
    """A request whose reader is in another process."""

    def __init__(self, request: GenerationRequest, message: Submit, relay: Relay) -> None:
        super().__init__(request, relay._engine.wake)
        self.number, self.submitted, self._relay = message.number, message.submitted, relay

    def push(self, delta: Delta) -> None:
        if self.request.stream:
            self._relay.push(self.number, delta)

    def complete(self, *outputs: SequenceOutput, last: bool = False) -> None:
        super().complete(*outputs, last=last)
        self._relay.complete(self.number, outputs, last)
        if self.done:
            self._relay.forget(self.number)

    def fail(self, error: ServingError) -> None:
        if not self.done:
            self._relay.fail(self.number, error)
            self._relay.forget(self.number)
        super().fail(error)
