"""Work on a stream of items in several processes, results in the order of the items.

A plan is sent along with every item and opened once in every process, so that tables and
models are loaded once. At most a few items a worker are in flight: memory does not grow.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

from mtk.errors import MtkError, WorkerError

IN_FLIGHT = 3  # items a worker
Item = TypeVar("Item")
Result = TypeVar("Result", covariant=True)


class Plan(Protocol[Result]):
    """What to do with every item; hashable and picklable, as workers receive it."""

    def open(self) -> Callable[[Any], Result]:
        """Load what the work needs; called once in a process."""
        ...

    def __hash__(self) -> int: ...


def in_order(items: Iterator[Item], plan: Plan[Result], workers: int) -> Iterator[Result]:
    """The result of every item, in order, by ``workers`` processes (1: this process).

    Raises what the work raises if that is an MtkError, and WorkerError if a worker dies.
    """
    if workers == 1:
        yield from map(plan.open(), items)
        return
    # Not fork: threads of this process would be lost.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_work, plan, item))
            if len(waiting) >= IN_FLIGHT * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except MtkError:
        raise
    except BrokenProcessPool as error:
        raise WorkerError(
            "a curation worker died without a message: it was killed (often for lack of memory; "
            "use fewer --workers), or this program is a script whose stage is not called under "
            'if __name__ == "__main__".'
        ) from error
    except Exception as error:
        raise WorkerError(f"a curation worker failed: {error!r}.") from error


@lru_cache(maxsize=1)
def _opened(plan: Plan[Any]) -> Callable[[Any], Any]:
    return plan.open()


def _work(plan: Plan[Any], item: Any) -> Any:
    return _opened(plan)(item)


def _start() -> None:
    """In a worker: the parent alone answers Ctrl-C, and the worker does not outlive it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
