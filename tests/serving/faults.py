"""Slow, hanging and failing engines, whatever they do inside a tick."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from serving.torch_engine import TorchEngine

Patch = pytest.MonkeyPatch


def before_each_tick(patch: Patch, action: Callable[[], None]) -> None:
    """``action`` runs in the engine's thread before each step of work."""
    real = TorchEngine._tick

    def tick(engine: TorchEngine) -> None:
        action()
        real(engine)

    patch.setattr(TorchEngine, "_tick", tick)


def slow_ticks(patch: Patch, seconds: float) -> None:
    before_each_tick(patch, lambda: time.sleep(seconds))


def gate_of_ticks(patch: Patch) -> threading.Event:
    """While the event is set the engine hangs."""
    closed = threading.Event()

    def wait() -> None:
        while closed.is_set():
            time.sleep(0.01)

    before_each_tick(patch, wait)
    return closed


def failing_tick(patch: Patch, after: float) -> None:
    """The engine's thread dies in its next tick, ``after`` so many seconds."""

    def fail() -> None:
        time.sleep(after)
        raise MemoryError("seeded")

    before_each_tick(patch, fail)
