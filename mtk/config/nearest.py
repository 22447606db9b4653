"""The legal values closest to a wrong one, as error messages name them."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt


def nearest(value: int, legal: Iterable[int]) -> str:
    """``Nearest: 2 or 4.``: the closest legal values on both sides; empty without any."""
    values = sorted(set(legal))
    below = [v for v in values if v < value]
    above = [v for v in values if v > value]
    closest = [*below[-1:], *above[:1]]
    return f"Nearest: {' or '.join(map(str, closest))}." if closest else ""


def divisors(whole: int) -> list[int]:
    """All divisors of ``whole``, smallest first; of 0 none."""
    small = [d for d in range(1, isqrt(max(whole, 0)) + 1) if whole % d == 0]
    return sorted({*small, *(whole // d for d in small)})


def multiples(value: int, unit: int) -> tuple[int, int]:
    """The multiples of ``unit`` (at least one) around ``value``."""
    below = value // unit * unit
    return (max(unit, below), below + unit)


def nearest_multiple(value: int, unit: int) -> int:
    """The multiple of ``unit`` (at least one) closest to ``value``."""
    return max(unit, round(value / unit) * unit)


def nearest_divisor(value: int, whole: int) -> int:
    """The divisor of ``whole`` closest to ``value``."""
    return min(divisors(whole), key=lambda d: (abs(d - value), d))
