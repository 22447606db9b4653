"""Work in several processes: in order, bounded, and honest about failures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from mtk.curation.workers import in_order
from mtk.data.workers import IN_FLIGHT
from mtk.errors import DataError, WorkerError


@dataclass(frozen=True)
class Doing:
    """Doubles numbers, the even ones slowly; ``bad`` names one that ends otherwise."""

    bad: str = ""

    def open(self) -> Callable[[int], int]:
        return self._double

    def _double(self, number: int) -> int:
        if number == 25 and self.bad == "dies":
            os._exit(9)
        if number == 25 and self.bad == "data":
            raise DataError("line 25 is bad")
        if number == 25 and self.bad == "bug":
            raise ZeroDivisionError("a bug")
        time.sleep(0.01 * (number % 2))
        return 2 * number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(in_order(iter(range(60)), Doing(), workers)) == list(range(0, 120, 2))


def test_only_so_many_items_are_taken_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number

    ahead = [taken - index for index, _ in enumerate(in_order(items(), Doing(), 2))]
    assert max(ahead) <= 2 * IN_FLIGHT


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ("dies", WorkerError, "died without a message"),
        ("data", DataError, "line 25 is bad"),
        ("bug", WorkerError, "ZeroDivisionError"),
    ],
)
def test_failures(bad: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        list(in_order(iter(range(60)), Doing(bad), 2))
