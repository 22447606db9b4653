"""What the measured requests of one point say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.bench.load import Measured

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Spread:
    """Percentiles (linear between neighbours), mean and maximum, in seconds."""

    p50: float
    p90: float
    p99: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(values, PERCENTILES))
        return cls(p50, p90, p99, sum(values) / len(values), max(values))


@dataclass(frozen=True)
class Point:
    """One point of the sweep. clients: of a closed loop; rate: of an open one. seconds: from the
    first request to the last answer. late: most that a request was sent after it was due, which
    is the benchmark's own fault."""

    clients: int | None
    rate: float | None
    seconds: float
    answered: int
    errors: dict[str, int]
    prompt_tokens: int
    new_tokens: int
    first: Spread | None
    gap: Spread | None
    each_token: Spread | None
    whole: Spread | None
    late: float
    good: int | None = None
    requests: Sequence[Measured] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return f"{self.clients} clients" if self.clients else f"{self.rate:g} requests/s"

    @property
    def tokens_per_second(self) -> float:
        """New tokens of answered requests."""
        return self.new_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return self.answered / self.seconds

    @property
    def goodput(self) -> float | None:
        """Requests a second within the limits, None without limits."""
        return None if self.good is None else self.good / self.seconds


def summarize(
    found: Sequence[Measured],
    *,
    clients: int | None = None,
    rate: float | None = None,
    max_first: float | None = None,
    max_token: float | None = None,
) -> Point:
    """The figures of a point; ``found`` is not empty. Failed requests count as errors only."""
    fine = [one for one in found if not one.error]
    limited = max_first is not None or max_token is not None
    good = sum(_within(one.first, max_first) and _within(one.each_token, max_token) for one in fine)
    return Point(
        clients,
        rate,
        max(one.ended for one in found) - min(one.sent for one in found),
        len(fine),
        dict(Counter(one.error for one in found if one.error)),
        sum(one.prompt_tokens for one in fine),
        sum(one.new_tokens for one in fine),
        Spread.of([one.first for one in fine if one.first is not None]),
        Spread.of([gap for one in fine for gap in one.gaps]),
        Spread.of([one.each_token for one in fine if one.each_token is not None]),
        Spread.of([one.whole for one in fine]),
        max(one.sent - one.due for one in found),
        good if limited else None,
        tuple(found),
    )


def _within(value: float | None, limit: float | None) -> bool:
    return limit is None or value is None or value <= limit


def plain(point: Point) -> dict[str, Any]:
    """For JSON; times in seconds."""
    spreads = {name: getattr(point, name) for name in ("first", "gap", "each_token", "whole")}
    return {
        "mode": "closed" if point.clients else "open",
        "clients": point.clients,
        "rate": point.rate,
        "seconds": point.seconds,
        "answered": point.answered,
        "errors": point.errors,
        "prompt_tokens": point.prompt_tokens,
        "new_tokens": point.new_tokens,
        "tokens_per_second": point.tokens_per_second,
        "prompt_tokens_per_second": point.prompt_tokens / point.seconds,
        "requests_per_second": point.requests_per_second,
        "goodput": point.goodput,
        **{name: vars(found) if found else None for name, found in spreads.items()},
        "late": point.late,
        "requests": [
            {
                "due": one.due,
                "sent": one.sent,
                "first": one.first,
                "whole": one.whole,
                "prompt_tokens": one.prompt_tokens,
                "new_tokens": one.new_tokens,
                "finish_reason": one.finish_reason,
                "error": one.error,
            }
            for one in point.requests
        ],
    }
