"""The ranks of one job on this machine: hand it out, watch, end all when one fails."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from time import monotonic
from typing import Any

from mtk.errors import MtkError
from mtk.launch.failures import Failure, describe_status
from mtk.launch.hang import RankState, explain, missing
from mtk.launch.rank_process import STACK_SIGNAL, Job, Returned
from mtk.launch.rank_server import Child, RankServer
from mtk.launch.stores import LOOPBACK, loopback_store
from mtk.launch.trace import TraceFile
from mtk.launch.verdict import Record, verdict

POLL = 0.25  # seconds between two looks at what the ranks are doing
# How long ranks may take to print the Python stack they were asked for.
STACKS = 1.0
# How long a rank that lost its peer waits for the peer's own report.
SETTLE = 1.5
# How long ranks may take to end before they are killed.
GRACE = 2.0
# How long ranks that were asked to stop may take for what follows the first one's answer (plots).
FINISH = 10.0
WAITED = "a collective did not end within {:g} s (--distributed-timeout-minutes)"


def pickle_call(function: Callable[..., Any], arguments: Sequence[Any]) -> bytes:
    """What a rank calls. Raises TypeError for functions that ranks cannot import."""
    if function.__module__ == "__main__" or "<locals>" in function.__qualname__:
        raise TypeError(
            f"{function.__qualname__} of {function.__module__}: ranks import the function they "
            f"run, so it must stand at the top of a module that can be imported."
        )
    return pickle.dumps((function, tuple(arguments)))


class Crew:
    """The children that do one job together; rank = place in ``children``.

    timeout: seconds that a collective may last.
    """

    def __init__(self, server: RankServer, children: Sequence[Child], timeout: float) -> None:
        self._server, self._children, self._timeout = server, children, timeout
        self._store = loopback_store(len(children), timeout)
        self._trace_file = server.folder / f"trace-{self._store.port}"
        self._trace = TraceFile.create(self._trace_file, len(children))
        self._records = {rank: Record(rank) for rank in range(len(children))}
        self._values: dict[int, bytes] = {}
        self._order: list[Record] = []
        self._open = {child.connection: rank for rank, child in enumerate(children)}
        self.stop: signal.Signals | None = None

    def start(self, call: bytes, device: str, *, joined: bool = False) -> None:
        """Hand out the job."""
        for rank, child in enumerate(self._children):
            variables = {
                "MTK_RANK": str(rank),
                "MTK_WORLD_SIZE": str(len(self._children)),
                "MTK_STORE": f"{LOOPBACK}:{self._store.port}",
                "MTK_TRACE": str(self._trace_file),
            }
            job = Job(call, variables, device, joined, self._timeout)
            try:
                child.connection.send_bytes(pickle.dumps(job))
            except OSError:
                continue  # it died already; wait() tells how
        if self.stop is not None:
            self.forward(self.stop)

    def forward(self, number: signal.Signals) -> None:
        """Ask every rank to stop; the first answer with Interrupted ends the job as such."""
        self.stop = number
        for child in self._children:
            child.send_signal(number)

    def wait(self, limit: float | None = None) -> list[Any]:
        """Every rank's value. Raises the error of the first rank that failed: its own MtkError
        or WorkerError. limit: seconds for the whole job."""
        started = monotonic()
        failed_at: float | None = None
        while len(self._values) < len(self._children):
            self._listen(POLL)
            if any(record.cause for record in self._order):
                self._listen_for(POLL)  # the others say that they lost their peer
                self._let_stop()
                break
            if self._order:
                failed_at = failed_at or monotonic()
                if monotonic() > failed_at + SETTLE:
                    raise self._hung("")
            elif limit is not None and monotonic() > started + limit:
                raise self._hung(f"the job took longer than its limit of {limit:g} s: ")
            elif self._overdue():
                raise self._hung(f"{WAITED.format(self._timeout)}: ")
        else:
            return [pickle.loads(self._values[rank]) for rank in sorted(self._values)]
        raise self._fail()

    def _let_stop(self) -> None:
        """Ranks that stop on request finish by themselves, unless another one failed."""
        deadline = monotonic() + FINISH
        while (
            self.stop is not None
            and all(record.interrupted for record in self._order if record.cause)
            and self._running()
            and monotonic() < deadline
        ):
            self._listen(POLL)

    def release(self) -> None:
        """Let the ranks go and drop what the job needed."""
        for child in self._children:
            child.close()
        self._trace.remove()

    def _listen(self, seconds: float) -> None:
        """Take in answers, deaths and output for up to ``seconds``."""
        outputs = {child.output: child for child in self._children if child.output is not None}
        for ready in wait([*self._open, *outputs, self._server.events], seconds):
            if ready is self._server.events:
                continue
            if ready in outputs:
                outputs[ready].read_output()
            else:
                self._take_answer(ready)
        # After the answers: a rank that answered and died has answered.
        if self._server.heard():
            self._server.hear()
        for rank, child in enumerate(self._children):
            self._note_death(rank, child)

    def _listen_for(self, seconds: float) -> None:
        deadline = monotonic() + seconds
        while monotonic() < deadline:
            self._listen(POLL / 5)

    def _take_answer(self, connection: Any) -> None:
        rank = self._open.pop(connection)
        try:
            answer: Returned | Failure = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return  # it died: the server tells how
        record = self._records[rank]
        if isinstance(answer, Failure):
            record.failure = answer
            self._order.append(record)
        else:
            record.returned = True
            self._values[rank] = answer.value

    def _note_death(self, rank: int, child: Child) -> None:
        record = self._records[rank]
        if child.status is None or record.status is not None or child.connection in self._open:
            return
        record.status = child.status
        if record.died:
            # NCCL's watchdog ends the process of the rank that waits, not of the missing one.
            record.timed_out = (
                os.WIFSIGNALED(child.status)
                and os.WTERMSIG(child.status) == signal.SIGABRT
                and self._trace.sight(rank).age >= 0.9 * self._timeout
            )
            self._order.append(record)

    def _overdue(self) -> bool:
        """A collective lasts longer than the backend should have let it."""
        limit = self._timeout + min(5.0, self._timeout / 2)
        sights = (self._trace.sight(r) for r in self._records if not self._records[r].returned)
        return any(sight.inside and sight.age > limit for sight in sights)

    def _states(self) -> dict[int, RankState]:
        return {
            rank: RankState(
                self._trace.sight(rank),
                self._trace.groups(rank),
                _gone(self._records[rank]),
                "is stopped (SIGSTOP)" if child.stopped else "",
            )
            for rank, child in enumerate(self._children)
        }

    def _hung(self, reason: str) -> MtkError:
        """The error that names the missing ranks; their Python stacks are asked for first."""
        states = self._states()
        running = [rank for rank, record in self._records.items() if not record.returned]
        for rank in missing(states) or running:
            self._children[rank].send_signal(STACK_SIGNAL)
        self._listen_for(STACKS)
        return self._fail(reason + (explain(states) or "the ranks are in no named collective"))

    def _fail(self, hang: str = "") -> MtkError:
        order = list(self._order)
        self.end()
        for rank, child in enumerate(self._children):
            self._records[rank].lines = list(child.lines)
        return verdict(order, self._records, stop=self.stop, hang=hang)

    def end(self, grace: float = GRACE) -> None:
        """Terminate every rank that runs, and kill those that do not end in time."""
        for rank, record in self._records.items():
            if record.status is None and record.failure is None:
                record.ended_by_us = True
                self._children[rank].send_signal(signal.SIGTERM)
        deadline = monotonic() + grace
        while self._running() and monotonic() < deadline:
            self._listen(POLL / 5)
        for child in self._children:
            child.send_signal(signal.SIGKILL)
        deadline = monotonic() + grace
        while any(child.status is None for child in self._children) and monotonic() < deadline:
            self._listen(POLL / 5)

    def _running(self) -> bool:
        return any(
            record.status is None and record.failure is None and not record.returned
            for record in self._records.values()
        )


def _gone(record: Record) -> str:
    """Why a rank will not come to any collective any more."""
    if record.returned:
        return "has finished its work"
    if record.failure is not None and record.failure.kind != "peer":
        return "failed"
    if record.died and not record.timed_out:
        return describe_status(record.status or 0)
    return ""
