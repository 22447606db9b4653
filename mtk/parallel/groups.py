"""Groups of ranks that communicate, and the note each rank keeps of its last collective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Trace(Protocol):
    """Told before and after every collective, so that a hang can be explained afterwards.

    site: name of the call site, e.g. ``tp.row``; group: name of the group. know: the members
    of this rank's groups. phase: what the rank does besides, e.g. ``data.next``, ``forward 3``.
    """

    def enter(self, site: str, group: str) -> None: ...
    def leave(self) -> None: ...
    def know(self, groups: Mapping[str, tuple[int, ...]]) -> None: ...
    def phase(self, name: str) -> None: ...


class NoTrace:
    """Keeps nothing; the default."""

    def enter(self, site: str, group: str) -> None:
        del site, group

    def leave(self) -> None:
        return

    def know(self, groups: Mapping[str, tuple[int, ...]]) -> None:
        del groups

    def phase(self, name: str) -> None:
        del name


@dataclass(frozen=True)
class Group:
    """Ranks that share one axis of the layout, and this rank's place among them.

    ranks: global ranks in the group's order. rank: own index in ``ranks``.
    handle: torch's ProcessGroup; None where there is one rank only, and collectives return
    at once.
    """

    name: str
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    handle: Any = None
    trace: Trace = field(default_factory=NoTrace, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def first(self) -> bool:
        """This rank leads the group: it alone counts or writes what all of them hold."""
        return self.rank == 0
