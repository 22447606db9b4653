"""SIGTERM as an exception, so that ``finally`` blocks clean up before the program ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mtk.errors import Interrupted


@contextmanager
def terminate_cleanly() -> Iterator[None]:
    """Inside the block SIGTERM raises Interrupted (main thread only; elsewhere no change)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Interrupted(
        f"stopped by {signal.Signals(number).name}; nothing was published. Repeat the command."
    )
