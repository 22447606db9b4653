"""What the server needs of an engine, whatever runs behind it.

The server knows only this module: an engine with continuous batching on paged caches, in
another process or around another library, replaces :class:`serving.torch_engine.TorchEngine`
without a change in the routes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mtk.errors import ServingError
from mtk.tokenizers import Tokenizer
from serving.encoder_prompt import EncoderPrompt
from serving.errors import OverloadedError
from serving.requests import Delta, GenerationRequest, SequenceOutput

# Deltas that may wait for a reader before its request is given up.
MAX_UNREAD = 4096


@dataclass(frozen=True)
class CacheStats:
    """tokens: held for sequences that run. blocks_used: held by sequences, blocks_free: by none;
    both 0 for a cache without blocks. Since the start: prefix_asked: tokens of prompts whose
    beginning was looked up, prefix_found: of these found. preemptions: sequences that lost their
    blocks to older ones and were read again. drafted: guessed tokens that were computed, accepted:
    of these right."""

    tokens: int
    blocks_used: int = 0
    blocks_free: int = 0
    prefix_asked: int = 0
    prefix_found: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class EngineStats:
    """running: sequences being decoded. waiting: requests of which nothing has begun."""

    running: int
    waiting: int
    cache: CacheStats

    @property
    def cached_tokens(self) -> int:
        return self.cache.tokens


@dataclass(frozen=True)
class Health:
    """Whether a token was really decoded just now. reason: why not."""

    ready: bool
    reason: str = ""


class Observer(Protocol):
    """Gets the engine's figures as they arise, in seconds and tokens."""

    def queued(self, seconds: float) -> None: ...
    def prompt(self, tokens: int) -> None: ...
    def token(self, seconds: float, *, first: bool) -> None: ...
    def finished(self, reason: str) -> None: ...


class Engine(Protocol):
    """Generates text. All methods may be called from any thread."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context(self) -> int:
        """Most tokens of prompt and continuation together; with an encoder of the latter."""

    @property
    def encoder(self) -> EncoderPrompt | None:
        """How prompts are read by an encoder; None for a model that continues its prompts."""

    @property
    def vocab_size(self) -> int:
        """Ids that a prompt may hold are 0 .. vocab_size - 1."""

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request. Raises ServingError: 400 if it cannot fit, 429 (OverloadedError)
        when the queue is full, 503 when the engine is dead or stopping."""

    def probe(self, timeout: float) -> Health:
        """Decode a token, or see that one was decoded just now."""

    def stats(self) -> EngineStats: ...

    def observe(self, observer: Observer) -> None:
        """Report figures to ``observer`` from now on."""

    def close(self, timeout: float) -> None:
        """Stop; requests that are still running get an error."""


class Ticket:
    """A request in the hands of an engine: the reader's and the engine's end of it."""

    def __init__(self, request: GenerationRequest, wake_engine: Callable[[], None]) -> None:
        self.request = request
        self.submitted = time.monotonic()
        self._wake_engine = wake_engine
        self._changed = threading.Condition()
        self._deltas: deque[Delta] = deque()
        self._outputs: dict[int, SequenceOutput] = {}
        self._expected: int = request.sequences
        self._error: ServingError | None = None
        self._cancelled = False

    # The reader's end.

    def cancel(self) -> None:
        """The answer is not wanted any more; the engine frees its rows at its next step."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
        self._wake_engine()

    def deltas(self, every: float) -> Iterator[Delta | None]:
        """Steps as they come, and None after ``every`` seconds without one, so that the
        reader can look after its connection. Raises ServingError if the request failed."""
        while True:
            with self._changed:
                if not self._deltas and not self.done:
                    self._changed.wait(every)
                if self._deltas:
                    delta = self._deltas.popleft()
                elif self._error is not None:
                    raise self._error
                elif self.done:
                    return
                else:
                    delta = None
            yield delta

    def wait(self, timeout: float) -> bool:
        """Wait for the end; whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def outputs(self) -> list[SequenceOutput]:
        """All sequences in order, once done. Raises ServingError if the request failed."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return [self._outputs[index] for index in sorted(self._outputs)]

    # The engine's end.

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def done(self) -> bool:
        return self._cancelled or self._error is not None or len(self._outputs) >= self._expected

    def push(self, delta: Delta) -> None:
        """Hand a step to a reader that streams; a reader that never reads is given up."""
        if not self.request.stream:
            return
        with self._changed:
            if len(self._deltas) >= MAX_UNREAD:
                self._error = OverloadedError(
                    "the client reads too slowly; the request was stopped"
                )
                self._deltas.clear()
            else:
                self._deltas.append(delta)
            self._changed.notify_all()

    def complete(self, *outputs: SequenceOutput, last: bool = False) -> None:
        """Add finished sequences. last: no more follow, however many were asked for."""
        with self._changed:
            self._outputs.update((output.index, output) for output in outputs)
            if last:
                self._expected = len(self._outputs)
            self._changed.notify_all()

    def fail(self, error: ServingError) -> None:
        with self._changed:
            if not self.done:
                self._error = error
            self._changed.notify_all()
