"""Run a function on several ranks, from a pool that lives as long as the test session."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mtk.config.pretrain import PretrainConfig
from mtk.errors import MtkError
from mtk.launch.pool import RankPool
from mtk.log import Reporter
from mtk.session import Session
from mtk.training.custom import NOTHING_OWN, Custom
from stages import pretrain

RANKS = 8
TIMEOUT = 120.0
QUIET = Session(Reporter(quiet=True))


@lru_cache(maxsize=1)
def _pool() -> RankPool:
    """One for each process of pytest-xdist."""
    pool = RankPool(RANKS, preload=[__name__], timeout=TIMEOUT / 2)
    atexit.register(pool.close)
    return pool


def run_pretrain(config: PretrainConfig, custom: Custom = NOTHING_OWN) -> None:
    """``mtk pretrain`` on as many ranks as it asks for, without starting a launcher: that is
    most of the time of a small run. Raises what a rank raised."""
    if config.parallel.nproc == 1:
        pretrain.run(config, QUIET, custom=custom)
        return
    arguments = (pretrain.train_here, config, QUIET, custom)
    _pool().run(*arguments, world=config.parallel.nproc, limit=TIMEOUT, joined=False)


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` on ``world`` gloo ranks; their results in order.

    function: of a module, as ranks import it. Raises AssertionError with the traceback of
    the first rank that fails.
    """
    try:
        return _pool().run(function, *args, world=world, limit=TIMEOUT)
    except MtkError as error:
        raise AssertionError(str(error.__cause__ or error)) from None
