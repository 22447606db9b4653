"""Work on a stream of tasks in this process or in a pool: results in order, few in flight.

Memory does not grow with the stream: at most a few tasks a worker have begun or wait.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from mtk.errors import MtkError, WorkerError

IN_FLIGHT = 3  # tasks a worker
Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    *,
    who: str = "a worker",
    raises: tuple[type[Exception], ...] = (),
) -> Generator[Result, None, None]:
    """``function`` of every task, by ``workers`` processes (1: this one).

    ``function``, tasks and results must be picklable unless ``workers`` is 1. raises: errors
    besides MtkError that come through as they are. Raises WorkerError if a worker dies or fails
    otherwise; who: what it is called there.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    methods = multiprocessing.get_all_start_methods()
    # Not fork: threads of this process (tokenizers', torch's, Prefect's) would be lost.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= IN_FLIGHT * workers:
                yield _result(waiting.popleft(), who, raises)
        while waiting:
            yield _result(waiting.popleft(), who, raises)
    except BrokenProcessPool as error:
        raise WorkerError(
            f"{who} died without a message: it was killed (often for lack of memory; use fewer "
            f"--workers), or this program is a script whose stage is not called under "
            f'if __name__ == "__main__".'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Result], who: str, raises: tuple[type[Exception], ...]) -> Result:
    try:
        return future.result()
    except Exception as error:
        if isinstance(error, (MtkError, BrokenProcessPool, *raises)):
            raise
        raise WorkerError(f"{who} failed: {error!r}.") from error


def _start() -> None:
    """In each worker: no threads of its own, no death by the terminal's Ctrl-C (the parent
    stops the pool), and no life after the parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_workers(wanted: int | None, sizes: Sequence[int]) -> int:
    """``wanted``, or a worker per core but none for less than 8 MiB of input."""
    if wanted is not None:
        return wanted
    return max(1, min(usable_cores(), sum(sizes) // (8 << 20)))
