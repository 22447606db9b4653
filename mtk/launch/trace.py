"""What each rank is doing, kept where others can read it after a hang.

A rank writes into a slot of 192 bytes of a memory-mapped file: no system calls, about a
microsecond, readable also when the rank is stopped, stuck in a loop or dead. ``hang.explain``
makes a sentence of it. Torch's own collectives (FSDP2, pipelining) are not seen; ``phase``
tells what a rank was doing around them.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

SLOT = 192
# [call, entered, site, group][inside, left][phases, since, phase]; times of the system-wide
# monotonic clock in seconds. Each bracket is written by one call.
_ENTER = struct.Struct("<Qd64s24sQ")
_LEAVE = struct.Struct("<Qd")
_PHASE = struct.Struct("<Qd40s")
_INSIDE = _ENTER.size - 8
_PHASES = _INSIDE + _LEAVE.size
_TEXT = 24


@dataclass(frozen=True)
class Sight:
    """What a slot says of a rank. Ages in seconds; call: number of the collective in its group.

    site, group: the last collective entered, "" for none; inside: it has not left it yet;
    age: since it entered (inside) or left it. phases: how many it began; phase: the last.
    """

    site: str = ""
    group: str = ""
    call: int = 0
    inside: bool = False
    age: float = 0.0
    phase: str = ""
    phases: int = 0
    phase_age: float = 0.0


class SlotTrace:
    """The :class:`~mtk.parallel.groups.Trace` of one rank, writing to ``slot``."""

    def __init__(self, slot: memoryview, groups_file: Path | None = None) -> None:
        self._slot, self._groups_file = slot, groups_file
        self._calls: dict[str, int] = {}
        self._texts: dict[tuple[str, str], tuple[bytes, bytes]] = {}
        self._phases = 0
        self.groups: dict[str, tuple[int, ...]] = {}

    def enter(self, site: str, group: str) -> None:
        texts = self._texts.get((site, group))
        if texts is None:
            texts = self._texts[(site, group)] = (site.encode()[:64], group.encode()[:_TEXT])
        call = self._calls[group] = self._calls.get(group, 0) + 1
        _ENTER.pack_into(self._slot, 0, call, monotonic(), *texts, 1)

    def leave(self) -> None:
        _LEAVE.pack_into(self._slot, _INSIDE, 0, monotonic())

    def phase(self, name: str) -> None:
        self._phases += 1
        _PHASE.pack_into(self._slot, _PHASES, self._phases, monotonic(), name.encode()[:40])

    def know(self, groups: Mapping[str, tuple[int, ...]]) -> None:
        self.groups = dict(groups)
        if self._groups_file is not None:
            self._groups_file.write_text(json.dumps(self.groups), encoding="utf-8")

    def sight(self) -> Sight:
        """What others see of this rank now."""
        return read_slot(self._slot)


def private_trace() -> SlotTrace:
    """A trace in this process's own memory."""
    return SlotTrace(memoryview(bytearray(SLOT)))


def read_slot(slot: memoryview) -> Sight:
    """Read a slot that its rank may be writing at this moment."""
    content = bytes(slot)
    for _ in range(5):
        again = bytes(slot)
        if again == content:
            break
        content = again
    now = monotonic()
    call, entered, site, group, inside = _ENTER.unpack_from(content)
    _, left = _LEAVE.unpack_from(content, _INSIDE)
    phases, since, phase = _PHASE.unpack_from(content, _PHASES)
    return Sight(
        _text(site),
        _text(group),
        call,
        bool(inside),
        now - (entered if inside else left),
        _text(phase),
        phases,
        now - since,
    )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


class TraceFile:
    """The slots of all ranks of a job on one machine, as a file that they share."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content = path, content
        self._view = memoryview(content)

    @classmethod
    def create(cls, path: Path, world: int) -> TraceFile:
        """A new file with a slot for each of ``world`` ranks."""
        path.write_bytes(bytes(SLOT * world))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> TraceFile:
        with path.open("r+b") as file:
            return cls(path, mmap.mmap(file.fileno(), 0))

    def trace(self, rank: int) -> SlotTrace:
        """For ``rank`` to write to."""
        return SlotTrace(self._slot(rank), self._groups_file(rank))

    def sight(self, rank: int) -> Sight:
        return read_slot(self._slot(rank))

    def groups(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The members of the groups of ``rank``; empty before it told."""
        try:
            found = json.loads(self._groups_file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {name: tuple(ranks) for name, ranks in found.items()}

    def remove(self) -> None:
        """Close the file and delete it, with what stands beside it."""
        self._view.release()
        self._content.close()
        for path in self._path.parent.glob(f"{self._path.name}*"):
            path.unlink(missing_ok=True)

    def _slot(self, rank: int) -> memoryview:
        return self._view[rank * SLOT : (rank + 1) * SLOT]

    def _groups_file(self, rank: int) -> Path:
        return self._path.with_suffix(f".{rank}.json")
