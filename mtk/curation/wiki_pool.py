"""Work on chunks in this process or in a pool; results in order, few in flight."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from mtk.errors import MtkError, WorkerError

IN_FLIGHT = 3  # chunks a worker
Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """``function`` of every task. It and the tasks must be picklable unless ``workers`` is 1.

    Raises WorkerError if a worker dies or fails.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    methods = multiprocessing.get_all_start_methods()
    # Not fork: threads of this process would be lost in it.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= IN_FLIGHT * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker died without a message: it was killed (often for lack of memory; use fewer "
            "--workers), or this program is a script whose stage is not called under "
            'if __name__ == "__main__".'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except (MtkError, BrokenProcessPool):
        raise
    except Exception as error:
        raise WorkerError(f"a worker failed: {error!r}.") from error


def _start_worker() -> None:
    """No death by the terminal's Ctrl-C (the parent stops the pool), no life after the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
