"""The loop that waits for sockets, at a price that idle and slow connections do not raise.

waitress asks every connection before every wait whether it wants to read or write; with some
hundred connections that say nothing this takes the interpreter away from those that are being
served. Here only connections are asked that something happened to, or on which another thread
works; all of them are looked at twice a second, for what else may have changed them.
"""

from __future__ import annotations

import select
import time
from typing import Any

from waitress import wasyncore
from waitress.channel import HTTPChannel

SCAN_EVERY = 0.5


class Poller:
    """sockets: waitress' map of descriptors, which changes while it is used."""

    def __init__(self, sockets: dict[int, Any]) -> None:
        self._sockets = sockets
        self._poll = select.poll()
        self._wanted: dict[int, int] = {}  # what each registered descriptor waits for
        self._known: set[int] = set()
        self._changed: set[int] = set()
        self._next_scan = 0.0

    def turn(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds, and let what is ready read and write."""
        now = time.monotonic()
        if now >= self._next_scan:
            self._next_scan = now + SCAN_EVERY
            self._changed = self._known | self._sockets.keys()
        # Before they are asked: one whose work ends in between must be asked again.
        in_work = {fd for fd in self._changed if _in_work(self._sockets.get(fd))}
        for descriptor in self._changed:
            self._ask(descriptor)
        self._changed = in_work
        for descriptor, flags in self._poll.poll(int(timeout * 1000)):
            self._changed.add(descriptor)
            found = self._sockets.get(descriptor)
            if found is not None:
                wasyncore.readwrite(found, flags)
        self._changed |= self._sockets.keys() - self._known

    def _ask(self, descriptor: int) -> None:
        """Register what a connection waits for; nothing, if it is gone."""
        found, flags = self._sockets.get(descriptor), 0
        if found is None:
            self._known.discard(descriptor)
        else:
            self._known.add(descriptor)
            if found.readable():
                flags |= select.POLLIN | select.POLLPRI
            if found.writable() and not found.accepting:
                flags |= select.POLLOUT
        if flags and self._wanted.get(descriptor) != flags:
            self._poll.register(descriptor, flags)
            self._wanted[descriptor] = flags
        elif not flags and self._wanted.pop(descriptor, 0):
            self._poll.unregister(descriptor)


def _in_work(found: Any) -> bool:
    """Whether another thread, or time, may change what it waits for."""
    if not isinstance(found, HTTPChannel):
        return found is not None  # the listener, and what wakes this loop
    return bool(
        found.requests or found.total_outbufs_len or found.will_close or found.close_when_flushed
    )
