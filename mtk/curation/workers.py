"""Plans of work on a stream of items, opened once in every process.

A plan is sent along with every item, so that tables and models are loaded once a process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

from mtk.data import workers as pool

Item = TypeVar("Item")
Result = TypeVar("Result", covariant=True)


class Plan(Protocol[Result]):
    """What to do with every item; hashable and picklable, as workers receive it."""

    def open(self) -> Callable[[Any], Result]:
        """Load what the work needs; called once in a process."""
        ...

    def __hash__(self) -> int: ...


def in_order(
    items: Iterator[Item], plan: Plan[Result], workers: int
) -> Generator[Result, None, None]:
    """The result of every item, in order, by ``workers`` processes (1: this process).

    Raises what the work raises if that is an MtkError, and WorkerError if a worker dies.
    """
    work = plan.open() if workers == 1 else partial(_work, plan)
    return pool.in_order(work, items, workers, who="a curation worker")


@lru_cache(maxsize=1)
def _opened(plan: Plan[Any]) -> Callable[[Any], Any]:
    return plan.open()


def _work(plan: Plan[Any], item: Any) -> Any:
    return _opened(plan)(item)
