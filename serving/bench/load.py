"""Requests sent to a server, one thread each, with the time of everything that comes back.

Closed loop: N clients, each of which asks again when it has its answer; the server decides the
pace. Open loop: requests come when they come, and how long one took counts from the moment it
was due, so that a server that lets others wait cannot hide it (Schroeder et al. 2006; "coordinated
omission").
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from mtk.config.bench_serve import LoadConfig
from mtk.errors import ServingError
from serving.client import Client
from serving.client_stream import NoAnswerError

TEXT = (
    "The quick brown fox jumps over the lazy dog while 27 engineers measure how long it takes. "
    "Every answer has a first word, a last one, and the time between; none of them come twice."
)


@dataclass(frozen=True)
class Asked:
    """One request. due: seconds after the start of the point; 0 in a closed loop."""

    prompt: tuple[int, ...]
    new_tokens: int
    seed: int
    due: float = 0.0


@dataclass(frozen=True)
class Measured:
    """One request's times, in seconds after the start of the point.

    due: when it should have been sent (closed loop: when it was). pieces: when text arrived.
    new_tokens: as the server counted them. error: what kind, "" for none.
    """

    due: float
    sent: float
    ended: float
    pieces: tuple[float, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish_reason: str | None = None
    error: str = ""

    @property
    def first(self) -> float | None:
        """Seconds to the first text."""
        return self.pieces[0] - self.due if self.pieces else None

    @property
    def whole(self) -> float:
        """Seconds to the end."""
        return self.ended - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals of text."""
        return [later - earlier for earlier, later in pairwise(self.pieces)]

    @property
    def each_token(self) -> float | None:
        """Mean seconds of a token after the first."""
        if len(self.pieces) < 2 or self.new_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.new_tokens - 1)


def vocabulary(client: Client, size: int | None) -> Sequence[int]:
    """Ids to draw prompts from."""
    return range(size) if size is not None else sorted(set(client.tokenize(TEXT)))


def questions(
    config: LoadConfig, ids: Sequence[int], context: int | None, rate: float | None, point: int
) -> list[Asked]:
    """The requests of a point; the same for the same seed, and different in each point, so that
    no cache has seen them. context: most tokens of prompt and answer together."""
    source = random.Random(f"{config.seed}/{point}")
    prefix = tuple(random.Random(config.seed).choices(ids, k=config.shared_prefix))
    most, due = context or 2**31, 0.0
    found = []
    for _ in range(config.requests):
        own = config.prompts.draw(source, max(1, most - len(prefix) - 1))
        prompt = (*prefix, *source.choices(ids, k=own))
        new = config.answers.draw(source, max(1, most - len(prompt)))
        found.append(Asked(prompt, new, source.getrandbits(31), due))
        if rate is not None:
            due += source.expovariate(rate) if config.arrivals == "poisson" else 1 / rate
    return found


class Load:
    """Sends requests and collects what was measured. A stop ends what is under way."""

    def __init__(self, client: Client, config: LoadConfig) -> None:
        self._client, self._config = client, config
        self._lock = threading.Lock()
        self._found: list[Measured] = []
        self._failures: list[BaseException] = []
        self._stopped = threading.Event()
        self._begun = 0.0

    def closed(self, asked: Sequence[Asked], clients: int) -> list[Measured]:
        """So many clients, until all requests are answered."""
        waiting = iter(asked)
        return self._run([lambda: self._client_of(waiting)] * min(clients, len(asked)))

    def open(self, asked: Sequence[Asked]) -> list[Measured]:
        """Each request when it is due."""
        return self._run([lambda one=one: self._when_due(one) for one in asked])  # type: ignore[misc]

    def _run(self, works: Sequence[Callable[[], None]]) -> list[Measured]:
        self._found = []
        threads = [threading.Thread(target=self._try, args=(w,), daemon=True) for w in works]
        self._begun = time.perf_counter()
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self._stopped.set()  # after Ctrl-C the others stop at their next piece
        self._stopped.clear()
        if self._failures:
            raise self._failures[0]
        return self._found

    def _try(self, work: Callable[[], None]) -> None:
        """What is no failed request ends the measurement, in the thread that began it."""
        try:
            work()
        except BaseException as error:
            self._failures.append(error)
            self._stopped.set()

    def _client_of(self, waiting: Iterator[Asked]) -> None:
        while not self._stopped.is_set():
            with self._lock:
                asked = next(waiting, None)
            if asked is None:
                return
            self._note(self.ask(replace(asked, due=self._now())))

    def _when_due(self, asked: Asked) -> None:
        if not self._stopped.wait(max(0.0, asked.due - self._now())):
            self._note(self.ask(asked))

    def _note(self, measured: Measured) -> None:
        with self._lock:
            self._found.append(measured)

    def _now(self) -> float:
        return time.perf_counter() - self._begun

    def ask(self, asked: Asked) -> Measured:
        """Send one request and read its answer to the end; failures are counted, not raised."""
        sent, pieces = self._now(), list[float]()
        extra: dict[str, Any] = self._config.extra
        try:
            with self._client.stream(
                asked.prompt,
                max_tokens=asked.new_tokens,
                temperature=self._config.temperature,
                seed=asked.seed,
                extra=extra,
            ) as stream:
                for piece in stream:
                    if piece:
                        pieces.append(self._now())
                    if self._stopped.is_set():
                        break
                answer = stream.answer
        except ServingError as error:
            return Measured(asked.due, sent, self._now(), error=f"HTTP {error.status}")
        except NoAnswerError as error:
            return Measured(asked.due, sent, self._now(), tuple(pieces), error=error.reason)
        ended = self._now()
        # A server that counts nothing: one token a piece is the best guess.
        new = int(answer.usage.get("completion_tokens", len(pieces)))
        prompt = int(answer.usage.get("prompt_tokens", len(asked.prompt)))
        return Measured(asked.due, sent, ended, tuple(pieces), prompt, new, answer.finish_reason)
