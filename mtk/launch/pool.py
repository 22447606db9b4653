"""Ranks that stand ready for many small jobs: tests, ``mtk verify layout --matrix``.

Every job gets ranks that were forked ahead and have done nothing yet, and a process group of
its own: whatever a job leaves behind (patched functions, caches keyed by meshes, random
states, half-finished collectives) ends with it. That is also faster than to reuse ranks, since
taking down gloo groups in order costs more than a fork.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from mtk.launch.crew import Crew, pickle_call
from mtk.launch.local import rank_variables
from mtk.launch.rank_server import Child, RankServer


class RankPool:
    """Up to ``ranks`` CPU ranks, one torch thread each. preload: modules that jobs need.

    timeout: seconds that a collective waits for a missing rank. The server starts with the
    first job (2 s) and ends with :meth:`close`, or with this process. Not for use from two
    threads at once.
    """

    def __init__(self, ranks: int, *, preload: Sequence[str] = (), timeout: float = 60.0) -> None:
        self.ranks, self._preload, self._timeout = ranks, tuple(preload), timeout
        self._server: RankServer | None = None
        self._spare: list[Child] = []

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        world: int,
        limit: float = 120.0,
        joined: bool = True,
    ) -> list[Any]:
        """``function(rank, *arguments)`` on ``world`` ranks; their values in order.

        The gloo process group exists when world > 1. joined: False for functions that join by
        themselves; as with ``launch`` they are given their place. limit: seconds for the job.
        Raises what :func:`~mtk.launch.local.launch` raises; an MtkError has the labelled
        traceback as its cause. The pool goes on after that.
        """
        if not 1 <= world <= self.ranks:
            raise ValueError(f"world = {world}: this pool has up to {self.ranks} ranks")
        call = pickle_call(function, arguments)
        server = self._started()
        crew = Crew(server, self._take(server, world), self._timeout)
        finished = False
        try:
            crew.start(call, "cpu", joined=joined)
            values = crew.wait(limit)
            finished = True
        finally:
            if not finished:
                crew.end(0.0)
            crew.release()
        self._spare += [server.fork() for _ in range(world)]
        return values

    def close(self) -> None:
        """End the server and every rank."""
        for child in self._spare:
            child.close()
        self._spare.clear()
        if self._server is not None:
            self._server.close()
            self._server = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _started(self) -> RankServer:
        if self._server is None:
            variables = {**rank_variables(self.ranks), "OMP_NUM_THREADS": "1"}
            self._server = RankServer(self._preload, variables)
        return self._server

    def _take(self, server: RankServer, world: int) -> list[Child]:
        while len(self._spare) < world:
            self._spare.append(server.fork())
        server.settle()
        taken, self._spare = self._spare[:world], self._spare[world:]
        return taken
