"""The engine in a process of its own, as the server's process sees it.

Whether a request fits and whether the queue is full is decided here, without asking; all else is
sent. Clients' threads then do not share an interpreter with the steps of the model, and what ends
the engine's process, a fault of CUDA or the kernel's answer to a lack of memory, does not end the
server: whoever waits is told at once.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtk.tokenizers import Tokenizer
from serving.encoder_prompt import EncoderPrompt
from serving.engine import CacheStats, EngineStats, Health, Observer, Ticket
from serving.engine_messages import (
    Cancel,
    Close,
    Died,
    Ping,
    Pong,
    Probe,
    Probed,
    Ready,
    Step,
    Submit,
    Warned,
    unpack_delta,
    without_grammar,
)
from serving.engine_workers import Workers
from serving.errors import NotReadyError
from serving.queue_limit import QueueLimit
from serving.requests import GenerationRequest, check_fits

# Seconds between two looks at whether the engine's process still lives.
PING_EVERY = 1.0
# Seconds without any answer from the process, whose step may last longer, until it counts as dead.
SILENCE = 10.0
# How long (seconds) processes of an engine that died may take to end by themselves.
LAST_WORDS = 15.0
NO_STATS = EngineStats(0, 0, CacheStats(0))


@dataclass
class _Probe:
    done: threading.Event = field(default_factory=threading.Event)
    health: Health = Health(False, "the engine did not answer")


class EngineProcess:
    """Implements :class:`serving.engine.Engine`.

    workers: whose first process serves the connection with a :class:`serving.engine_child.Relay`.
    max_batch_size, max_queue: as for the engine itself. step_timeout: seconds that one step may
    last, silence: that the process may not answer; then it is ended. report: gets warnings, and
    why the engine died. Waits until the engine is ready; raises what its process failed with.
    """

    def __init__(
        self,
        workers: Workers,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int,
        max_queue: int,
        step_timeout: float,
        silence: float = SILENCE,
        report: Callable[[str], None] = print,
    ) -> None:
        self.workers, self._tokenizer, self._report = workers, tokenizer, report
        self._max_batch_size = max_batch_size
        self._queue = QueueLimit(max_queue, max_batch_size)
        self._step_timeout, self._silence = step_timeout, silence
        self._observer: Observer | None = None
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._probes: dict[int, _Probe] = {}
        self._numbers, self._probe_numbers = itertools.count(1), itertools.count(1)
        self._submitted = self._seen = 0
        self._stats = NO_STATS
        self._death: str | None = None
        self._crashed = self._stopping = False
        self._closed = threading.Event()
        # Pings since the process answered, and since it was seen to get on. Not times: this process
        # itself may have been stopped.
        self._silent = self._still = 0
        self._ticks = -1
        self._line = workers.connection()
        self._ready = self._until_ready()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"mtk-engine-{name}", daemon=True)
            for name, target in (
                ("receive", self._receive),
                ("send", self._send),
                ("ping", self._keep_pinging),
            )
        ]
        for thread in self._threads:
            thread.start()

    def _until_ready(self) -> Ready:
        while True:
            try:
                messages = self._line.receive()
            except (EOFError, OSError):
                raise self.workers.why() from None
            for message in messages:
                if isinstance(message, Warned):
                    self._report(message.text)
                elif isinstance(message, Ready):
                    return message

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def context(self) -> int:
        return self._ready.context

    @property
    def vocab_size(self) -> int:
        return self._ready.vocab_size

    @property
    def encoder(self) -> EncoderPrompt | None:
        return self._ready.encoder

    @property
    def died(self) -> str | None:
        """Why the engine ended, unless it was stopped on request."""
        return self._death if self._crashed else None

    def observe(self, observer: Observer) -> None:
        self._observer = observer

    def submit(self, request: GenerationRequest) -> Ticket:
        vocab = self.vocab_size
        check_fits(request, context=self.context, vocab=vocab, encoder=self.encoder)
        sendable = without_grammar(request)
        with self._lock:
            self._refuse_if_stopped()
            self._queue.check(self._waiting(), idle=self._idle())
            number = self._submitted = next(self._numbers)
            ticket = Ticket(request, lambda: self._cancel(number))
            self._tickets[number] = ticket
            self._outbox.put(Submit(number, ticket.submitted, sendable))
        return ticket

    def probe(self, timeout: float) -> Health:
        probe, number = _Probe(), next(self._probe_numbers)
        with self._lock:
            if self._death is not None:
                return Health(False, self._death)
            self._probes[number] = probe
        self._outbox.put(Probe(number, timeout))
        probe.done.wait(timeout)
        with self._lock:
            self._probes.pop(number, None)
        return probe.health

    def stats(self) -> EngineStats:
        with self._lock:
            return EngineStats(self._stats.running, self._waiting(), self._stats.cache)

    def close(self, timeout: float) -> None:
        with self._lock:
            self._stopping = True
        self._outbox.put(Close(timeout))
        self._threads[0].join(timeout)
        self._die("the server is stopping", crashed=False)
        self._closed.set()
        self._line.close()
        self._outbox.put(Ping())  # wakes the thread that sends
        self.workers.close(timeout=1.0)

    def _waiting(self) -> int:
        """Requests of which nothing has begun: as the engine counted, and those on their way."""
        return self._stats.waiting + max(0, self._submitted - self._seen)

    def _idle(self) -> bool:
        """A row is free and nobody is before a new request."""
        return self._waiting() == 0 and self._stats.running < self._max_batch_size

    def _refuse_if_stopped(self) -> None:
        if self._death is not None:
            raise NotReadyError(self._death)
        if self._stopping:
            raise NotReadyError("the server is stopping")

    def _cancel(self, number: int) -> None:
        with self._lock:
            known = self._tickets.pop(number, None) is not None
        if known:
            self._outbox.put(Cancel(number))

    # The sending thread: who submits never waits for the engine's process.

    def _send(self) -> None:
        while not self._closed.is_set():
            messages = [self._outbox.get()]
            while not self._outbox.empty():
                messages.append(self._outbox.get())
            try:
                self._line.send(*messages)
            except OSError:
                return  # the receiving thread tells everybody

    # The receiving thread.

    def _receive(self) -> None:
        try:
            while self._death is None:
                for message in self._line.receive():
                    self._handle(message)
            self._line.close()  # which ends its process
            if self._crashed:
                self._bury()
        except (EOFError, OSError):
            known = self._death is not None or self._stopping
            self._die("the engine died: its process ended", crashed=not self._stopping)
            if not known:
                self._report(f"{self._death}\n{self.workers.why()}")

    def _bury(self) -> None:
        """Hear what else is known of the death, if another process had a part in it."""
        if not self.workers.ended.wait(LAST_WORDS):
            self.workers.kill()
        elif self.workers.error is not None:
            self._report(str(self.workers.error))

    def _handle(self, message: Any) -> None:
        self._silent = 0
        if isinstance(message, Step):
            self._take_step(message)
        elif isinstance(message, Probed):
            with self._lock:
                probe = self._probes.pop(message.number, None)
            if probe is not None:
                probe.health = message.health
                probe.done.set()
        elif isinstance(message, Pong):
            if message.ticks != self._ticks or not message.busy:
                self._ticks, self._still = message.ticks, 0
        elif isinstance(message, Warned):
            self._report(message.text)
        elif isinstance(message, Died):
            self._die(message.reason, crashed=message.crashed)

    def _take_step(self, step: Step) -> None:
        with self._lock:
            self._stats, self._seen = step.stats, max(self._seen, step.seen)
        for number, packed in step.deltas:
            ticket = self._tickets.get(number)
            if ticket is not None:
                ticket.push(unpack_delta(packed))
                if ticket.done:  # nobody reads
                    self._cancel(number)
        for number, outputs, last in step.outputs:
            ticket = self._tickets.get(number)
            if ticket is not None:
                ticket.complete(*outputs, last=last)
                if ticket.done:
                    self._forget(number, ticket)
        for number, error in step.failures:
            ticket = self._tickets.pop(number, None)
            if ticket is not None:
                ticket.fail(error)
        self._show(step.figures)

    def _show(self, figures: Sequence[tuple[Any, ...]]) -> None:
        observer = self._observer
        if observer is None:
            return
        for kind, value, *more in figures:
            if kind == "token":
                observer.token(value, first=more[0])
            elif kind == "queued":
                observer.queued(value)
            elif kind == "prompt":
                observer.prompt(value)
            else:
                observer.finished(value)

    def _forget(self, number: int, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.pop(number, None)
            self._queue.learn(ticket)

    # The pinging thread.

    def _keep_pinging(self) -> None:
        while not self._closed.wait(PING_EVERY) and self._death is None:
            self._outbox.put(Ping())
            self._silent, self._still = self._silent + 1, self._still + 1
            if self._silent * PING_EVERY > self._silence:
                self._give_up(f"its process has not answered for {self._silence:g} s")
            elif self._still * PING_EVERY > self._step_timeout:
                self._give_up(f"a step took longer than {self._step_timeout:g} s (--step-timeout)")

    def _give_up(self, why: str) -> None:
        self._die(f"the engine hangs: {why}", crashed=True)
        self._report(f"the engine hangs: {why}; its process is ended")
        self.workers.kill()

    def _die(self, reason: str, *, crashed: bool) -> None:
        """Tell everybody who waits; the first reason counts."""
        with self._lock:
            if self._death is None:
                self._death, self._crashed = reason, crashed
            reason = self._death
            tickets, self._tickets = list(self._tickets.values()), {}
            probes, self._probes = list(self._probes.values()), {}
            self._stats, self._seen = NO_STATS, self._submitted
        for ticket in tickets:
            ticket.fail(NotReadyError(reason))
        for probe in probes:
            probe.health = Health(False, reason)
            probe.done.set()
