"""How many requests may wait for an engine, and what one that is refused is told."""

from __future__ import annotations

import time

from serving.engine import Ticket
from serving.errors import OverloadedError

# How much the newest request counts in the average of all.
NEWEST = 0.1


class QueueLimit:
    """most: requests that may wait. rows: sequences that run at once. Its user has a lock."""

    def __init__(self, most: int, rows: int) -> None:
        self._most, self._rows = most, rows
        self._seconds = 1.0

    def check(self, waiting: int, *, idle: bool) -> None:
        """waiting: requests of which nothing has begun. idle: whether one more would not wait.
        Raises OverloadedError, with the time that those who wait are likely to take."""
        if waiting >= self._most and not idle:
            raise OverloadedError(
                f"{waiting} requests are waiting already (max_queue = {self._most})",
                retry_after=round(self._seconds * (waiting + 1)),
            )

    def learn(self, ticket: Ticket) -> None:
        """A request has ended: keep a moving average of the seconds that one takes from a row."""
        seconds = (time.monotonic() - ticket.submitted) / self._rows
        self._seconds += NEWEST * (seconds - self._seconds)
