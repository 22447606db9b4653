"""Tables of names, written as text to be short."""

from __future__ import annotations


def names(text: str) -> tuple[str, ...]:
    """Cut at ``|``; line ends and spaces around a name do not count."""
    return tuple(name for part in text.split("|") if (name := " ".join(part.split())))


def words(text: str) -> tuple[str, ...]:
    """Cut at spaces and line ends."""
    return tuple(text.split())
