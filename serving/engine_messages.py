"""What the server's process and the engine's tell each other, over a socket of this machine.

Messages are pickled: both ends are this program, and nobody else can reach the socket. All that a
step brings goes in one message, with tuples in place of objects, as most of what is sent is small.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mtk.errors import ServingError
from serving.encoder_prompt import EncoderPrompt
from serving.engine import EngineStats, Health
from serving.grammar import JsonGrammars
from serving.guides import Matcher
from serving.requests import Delta, GenerationRequest, SequenceOutput, TokenLogprob

# Of the socket, in the folder of the job.
NAME = "engine"
# Paths of sockets are short.
MOST_PATH = 100


@dataclass(frozen=True)
class Submit:
    """number: counts requests. submitted: when, on the clock that all processes share."""

    number: int
    submitted: float
    request: GenerationRequest


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class Probe:
    number: int
    timeout: float


@dataclass(frozen=True)
class Ping:
    """Asks for a :class:`Pong`."""


@dataclass(frozen=True)
class Close:
    """The engine is to stop within ``timeout`` seconds; its process then ends."""

    timeout: float


@dataclass(frozen=True)
class Ready:
    """The engine takes requests of at most ``context`` tokens below ``vocab_size``. encoder: see
    :class:`serving.engine.Engine`."""

    context: int
    vocab_size: int
    encoder: EncoderPrompt | None = None


@dataclass(frozen=True)
class Warned:
    text: str


@dataclass(frozen=True)
class Pong:
    """ticks: steps of work that the engine has begun. busy: whether there is any to do."""

    ticks: int
    busy: bool


@dataclass(frozen=True)
class Probed:
    number: int
    health: Health


@dataclass(frozen=True)
class Died:
    """The engine stopped. crashed: and nobody had asked it to."""

    reason: str
    crashed: bool


@dataclass(frozen=True)
class Step:
    """What one or some steps brought. deltas, outputs: by request, see :func:`pack_delta`, and
    whether no more outputs follow. figures: calls of the observer. seen: the last request that the
    engine had taken in when it counted ``stats``."""

    deltas: Sequence[tuple[int, tuple[Any, ...]]]
    outputs: Sequence[tuple[int, tuple[SequenceOutput, ...], bool]]
    failures: Sequence[tuple[int, ServingError]]
    figures: Sequence[tuple[Any, ...]]
    stats: EngineStats
    seen: int


def pack_delta(delta: Delta) -> tuple[Any, ...]:
    """A delta as tuples."""
    return (
        delta.index,
        delta.tokens,
        delta.text,
        _pack(delta.logprobs),
        delta.finish,
        _pack(delta.prompt_logprobs),
    )


def unpack_delta(packed: tuple[Any, ...]) -> Delta:
    index, tokens, text, logprobs, finish, prompt_logprobs = packed
    return Delta(index, tokens, text, _unpack(logprobs), finish, _unpack(prompt_logprobs))


def _pack(logprobs: Iterable[TokenLogprob]) -> tuple[Any, ...]:
    return tuple((item.token, item.logprob, item.top) for item in logprobs)


def _unpack(packed: Iterable[tuple[Any, ...]]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(*item) for item in packed)


@dataclass
class GrammarText:
    """A grammar on its way: the compiled one stays behind, as it cannot be sent."""

    source: str

    def begin(self) -> Matcher:
        raise NotImplementedError("a grammar is compiled where it is used")


def without_grammar(request: GenerationRequest) -> GenerationRequest:
    """The request as it can be sent."""
    guide = request.guide
    if guide is None or guide.grammar is None:
        return request
    text = GrammarText(guide.grammar.source)
    return replace(request, guide=replace(guide, grammar=text))


def with_grammar(request: GenerationRequest, grammars: JsonGrammars) -> GenerationRequest:
    """The request with its grammar compiled again. Raises ServingError."""
    guide = request.guide
    if guide is None or not isinstance(guide.grammar, GrammarText):
        return request
    grammar = grammars.of_source(guide.grammar.source)
    return replace(request, guide=replace(guide, grammar=grammar))


class Line:
    """One end of a connection. Several threads may send, one receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()

    def send(self, *messages: Any) -> None:
        """Raises OSError when the other end is gone."""
        content = pickle.dumps(messages, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.send_bytes(content)

    def receive(self) -> tuple[Any, ...]:
        """Waits. Raises EOFError or OSError when the other end is gone."""
        messages: tuple[Any, ...] = pickle.loads(self._connection.recv_bytes())
        return messages

    def close(self) -> None:
        """Also wakes the thread that receives."""
        try:
            with socket.socket(fileno=os.dup(self._connection.fileno())) as ours:
                ours.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is closed already


def listen(folder: Path, name: str = NAME) -> socket.socket:
    """A socket in ``folder``, which is this user's alone."""
    listener = socket.socket(socket.AF_UNIX)
    _at(listener.bind, folder, name)
    listener.listen()
    return listener


def connect(folder: Path) -> Line:
    """To the server that listens in ``folder``."""
    return Line(open_connection(folder))


def open_connection(folder: Path, name: str = NAME) -> Connection:
    """To who listens in ``folder``."""
    ours = socket.socket(socket.AF_UNIX)
    _at(ours.connect, folder, name)
    return Connection(ours.detach())


def _at(act: Any, folder: Path, name: str) -> None:
    path = str(folder / name)
    if len(path) <= MOST_PATH:
        act(path)
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        act(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)
