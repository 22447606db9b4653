"""Run a function on several ranks of this machine (``--nproc N``).

Ranks are forked from a server that has torch loaded and never touched CUDA. The first that
fails ends the job: its own error comes first, the others are ended, none survives. That holds
for the launcher too, however it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

from mtk.errors import Interrupted
from mtk.launch.crew import Crew, pickle_call
from mtk.launch.process import require_gpus
from mtk.launch.rank_server import RankServer

# Some supervisors (timeout, srun) deliver one SIGTERM twice; a second request comes later.
TWICE = 1.0


def launch(
    function: Callable[..., Any],
    arguments: Sequence[Any] = (),
    nproc: int = 1,
    *,
    device: str = "cpu",
    timeout: float = 600.0,
) -> Any:
    """``function(place, *arguments)`` on ``nproc`` ranks; returns rank 0's value.

    function: at the top of a module; it joins the others with ``process.join``. Arguments and
    value are pickled between these processes (CUDA tensors: move them to the CPU first).
    timeout: seconds that a collective waits for a missing rank. Rank 0 owns the terminal.

    SIGTERM and SIGINT are forwarded to all ranks once, which stop as they see fit; a second
    SIGINT, or a SIGTERM more than a second later, kills them. Raises the MtkError that a rank
    raised, Interrupted when they stopped, LayoutError for too few GPUs, else WorkerError with
    the traceback of the rank that failed first, the signal that killed it, or the collective
    that it never entered.
    """
    call = pickle_call(function, arguments)
    if device == "cuda":
        require_gpus(nproc)
    server = RankServer([function.__module__], rank_variables(nproc))
    try:
        children = [server.fork(owns_terminal=rank == 0) for rank in range(nproc)]
        crew = Crew(server, children, timeout)
        try:
            with _forwarding(crew):
                server.settle()
                crew.start(call, device)
                return crew.wait()[0]
        finally:
            crew.release()
    finally:
        server.close()


def rank_variables(ranks: int) -> dict[str, str]:
    """What local ranks need in their environment, unless the user set it."""
    variables = {"OMP_NUM_THREADS": str(max(1, usable_cores() // ranks))}
    if sys.platform == "linux":
        # Also where the host's own name leads nowhere, as in many containers.
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    # Before it ends a rank that waits too long, NCCL's watchdog gives its debug dump four times
    # this span, a minute by default, also when no dump is asked for; the launcher knows already
    # who is missing.
    variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    variables["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "250"
    return {name: text for name, text in variables.items() if name not in os.environ}


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _forwarding(crew: Crew) -> Iterator[None]:
    """Pass SIGTERM and SIGINT on to the ranks while the block runs (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if not asked:
            asked.append(monotonic())
            crew.forward(signal.Signals(number))
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif monotonic() > asked[0] + TWICE:
            raise Interrupted(
                "a second SIGTERM ended the ranks before they had stopped. The newest complete "
                "checkpoint stays; repeat the command."
            )

    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
