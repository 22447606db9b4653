"""Run a function on several ranks, from a pool that lives as long as the test session."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mtk.errors import MtkError
from mtk.launch.pool import RankPool

RANKS = 8
TIMEOUT = 120.0


@lru_cache(maxsize=1)
def _pool() -> RankPool:
    """One for each process of pytest-xdist."""
    pool = RankPool(RANKS, preload=[__name__], timeout=TIMEOUT / 2)
    atexit.register(pool.close)
    return pool


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` on ``world`` gloo ranks; their results in order.

    function: of a module, as ranks import it. Raises AssertionError with the traceback of
    the first rank that fails.
    """
    try:
        return _pool().run(function, *args, world=world, limit=TIMEOUT)
    except MtkError as error:
        raise AssertionError(str(error.__cause__ or error)) from None
