"""Processes for an engine: started before the model is read, watched, and ended with the server.

They are ranks as training has them (:mod:`mtk.launch`): forked from a process that has torch
loaded and never touched CUDA, in a session of their own, which Ctrl-C does not reach; when this
process is gone, however it ended, they are too.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mtk.errors import MtkError, WorkerError
from mtk.launch.crew import Crew, pickle_call
from mtk.launch.local import rank_variables
from mtk.launch.rank_server import RankServer
from serving.engine_messages import Line, listen

# How often (seconds) who waits for the engine looks whether its processes are still there.
LOOK_EVERY = 0.2


def start_server(module: str, ranks: int = 1) -> RankServer:
    """The process that ``ranks`` others are forked from. It loads torch and ``module`` while this
    one does other things; nothing that only training needs, so that it is there soon."""
    return RankServer([module], rank_variables(ranks), base=("torch",))


class Workers:
    """``function(place, folder, *arguments)`` on ``ranks`` processes, of which the first connects
    to this one in ``folder`` (:func:`serving.engine_messages.connect`).

    Returns at once. server: forks them, and must outlive them; nobody else may use it meanwhile.
    timeout: seconds that a collective may last. error: what a process failed with, once ``ended``
    is set.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        server: RankServer,
        *,
        ranks: int = 1,
        timeout: float = 600.0,
    ) -> None:
        self.error: MtkError | None = None
        self.ended = threading.Event()
        self._server, self._settled = server, False
        folder = Path(tempfile.mkdtemp(prefix="engine-", dir=server.folder))
        self._listener = listen(folder)
        self._children = [server.fork(owns_terminal=rank == 0) for rank in range(ranks)]
        call = pickle_call(function, (folder, *arguments))
        self._thread = threading.Thread(
            target=self._watch, args=(call, timeout), name="mtk-engine-watch", daemon=True
        )
        self._thread.start()

    @property
    def processes(self) -> list[int]:
        """Their numbers, as far as they have started."""
        return [child.process for child in self._children if child.process]

    def connection(self) -> Line:
        """The engine's end, once it is there. Raises the MtkError that a process ended with."""
        self._listener.settimeout(LOOK_EVERY)
        with self._listener:
            while not self.ended.is_set():
                with suppress(TimeoutError):
                    theirs, _ = self._listener.accept()
                    theirs.setblocking(True)
                    return Line(Connection(theirs.detach()))
        raise self.why()

    def why(self, timeout: float = 10.0) -> MtkError:
        """What ended the processes; waits until that is known."""
        self.ended.wait(timeout)
        return self.error or WorkerError("the engine's process ended without saying why")

    def kill(self) -> None:
        for child in self._children:
            child.send_signal(signal.SIGKILL)

    def close(self, timeout: float = 0.0) -> None:
        """Wait for their end, and end those that are left."""
        self.ended.wait(timeout)
        self.kill()
        self._listener.close()
        if self._settled:  # else the server does not listen yet
            self._thread.join()

    def _watch(self, call: bytes, timeout: float) -> None:
        try:
            self._server.settle()
            self._settled = True
            crew = Crew(self._server, self._children, timeout)
            try:
                crew.start(call, "cpu")
                crew.wait()
            finally:
                crew.release()
        except MtkError as error:
            self.error = error
        except Exception as error:  # the server went while it was being listened to
            self.error = WorkerError(f"the engine's processes cannot be watched: {error}")
        finally:
            self.ended.set()
