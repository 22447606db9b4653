"""The launcher's side of the fork server: start it, ask for ranks, hear how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mtk.errors import WorkerError
from mtk.launch.fork_server import EVENT, FORKED, PRELOAD

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from mtk.launch.fork_server import serve; "
    "serve(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[4]), sys.argv[5])"
)
KEPT_LINES = 100
# How long the server may take to kill its ranks and end.
_END = 5.0


@dataclass(eq=False)
class Child:
    """A forked rank. output: the read end of its stdout and stderr, None where it owns the
    terminal. process: 0 until the server told. status: how it ended, as of ``os.waitpid``."""

    connection: Connection
    output: Connection | None = None
    process: int = 0
    status: int | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    _rest: bytes = b""

    def read_output(self) -> None:
        """Keep what the rank wrote; after its end there is no ``output`` any more."""
        if self.output is None:
            return
        content = os.read(self.output.fileno(), 65536)
        *whole, self._rest = (self._rest + content).split(b"\n")
        if not content:
            whole, self._rest = [self._rest] if self._rest else [], b""
            self.output.close()
            self.output = None
        self.lines.extend(line.decode(errors="replace") for line in whole)

    def send_signal(self, number: int) -> None:
        if self.process and self.status is None:
            try:
                os.kill(self.process, number)
            except ProcessLookupError:
                return

    @property
    def stopped(self) -> bool:
        """By SIGSTOP or a debugger (Linux only)."""
        try:
            stat = Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def close(self) -> None:
        self.connection.close()
        if self.output is not None:
            self.output.close()
            self.output = None


class RankServer:
    """A running fork server.

    preload: modules that the ranks will need, beside those of ``base``; variables: added to its
    environment, which the ranks inherit. folder: temporary, for the jobs; it goes with the server.
    events: readable when :meth:`hear` has something to hear.
    """

    def __init__(
        self,
        preload: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        *,
        base: Sequence[str] = PRELOAD,
    ) -> None:
        self.events, theirs = socket.socketpair()
        self._waiting: deque[Child] = deque()
        self._children: dict[int, Child] = {}
        self._bytes = b""
        self.folder = Path(tempfile.mkdtemp(prefix="mtk-job-"))
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path)]
        arguments += [json.dumps([*base, *preload]), str(self.folder)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(variables or {})},
                start_new_session=True,
            )

    def fork(self, *, owns_terminal: bool = False) -> Child:
        """Ask for a rank; it is there after :meth:`settle`."""
        ours, theirs = socket.socketpair()
        child = Child(Connection(ours.detach()))
        descriptors = [theirs.fileno()]
        write = None
        if not owns_terminal:
            read, write = os.pipe()
            child.output = Connection(read, writable=False)
            descriptors.append(write)
        try:
            socket.send_fds(self.events, [b"R"], descriptors)
        except OSError:
            raise self._gone() from None
        finally:
            theirs.close()
            if write is not None:
                os.close(write)
        self._waiting.append(child)
        return child

    def settle(self) -> None:
        """Wait until every rank that was asked for exists."""
        while self._waiting:
            self.hear()

    def hear(self) -> None:
        """Take in what the server says; waits for at least one event."""
        content = self.events.recv(65536)
        if not content:
            raise self._gone()
        self._bytes += content
        while len(self._bytes) >= EVENT.size:
            kind, process, status = EVENT.unpack_from(self._bytes)
            self._bytes = self._bytes[EVENT.size :]
            if kind == FORKED:
                child = self._waiting.popleft()
                child.process = process
                self._children[process] = child
            else:
                self._children.pop(process).status = status

    def heard(self) -> bool:
        """There is something to hear now."""
        return bool(wait([self.events], 0))

    def close(self, grace: float = _END) -> None:
        """End the server, and with it every rank; by force after ``grace`` seconds."""
        # Not by closing alone: a thread that hears would keep the socket open.
        with suppress(OSError):
            self.events.shutdown(socket.SHUT_RDWR)
        self.events.close()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        for child in (*self._children.values(), *self._waiting):
            child.close()

    def _gone(self) -> WorkerError:
        try:
            status: int | None = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = None
        return WorkerError(
            f"the process that starts ranks ended unexpectedly (exit status {status}); its own "
            f"message stands above. Is there enough memory?"
        )
