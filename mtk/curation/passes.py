"""A pass over the input: stretches to workers, results in order into parts.

A pass that was killed goes on behind its last finished part. How records are spread over
parts depends on the input and the size of a part alone, so the joined output does not tell
how often the work was interrupted, or with how many workers it was done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mtk.artifacts.parts import Parts
from mtk.curation.pages import START, Place, Source
from mtk.curation.workers import Plan, in_order
from mtk.log import Progress

PHASE, PLACE, CLOSED = "phase", "place", "closed"


class Placed(Protocol):
    """A worker's result for one stretch. size: its bytes, uncompressed; done: its share of
    the bytes on disk."""

    @property
    def end(self) -> Place: ...
    @property
    def size(self) -> int: ...
    @property
    def done(self) -> int: ...


R = TypeVar("R", bound=Placed)
Written = TypeVar("Written", contravariant=True)


class PartWriter(Protocol[Written]):
    """Writes the results of one part; ``facts`` is read when the part is complete."""

    @property
    def facts(self) -> dict[str, Any]: ...

    def add(self, found: Written, /) -> None: ...


# Opens a writer for the folder of a part.
Writing = Callable[[Path], AbstractContextManager[PartWriter[R]]]


def run_pass(
    parts: Parts,
    phase: str,
    source: Source,
    plan: Plan[R],
    writing: Writing[R],
    *,
    workers: int,
    part_bytes: int,
    progress: Progress,
) -> None:
    """Do what is left of a pass. Raises DataError, WorkerError and what the writer raises."""
    if is_closed(parts, phase):
        return
    results = in_order(source.after(start_of(parts, phase)), plan, workers)
    for first in results:
        facts: dict[str, Any] = {PHASE: phase}
        with parts.grow(facts) as folder:
            with writing(folder) as writer:
                for result in _of_one_part(first, results, part_bytes):
                    writer.add(result)
                    facts[PLACE] = result.end
                    progress.advance(result.done / 1e6)
            facts |= writer.facts
    close(parts, phase)


def _of_one_part(first: R, rest: Iterator[R], part_bytes: int) -> Iterator[R]:
    yield first
    size = first.size
    while size < part_bytes:
        result = next(rest, None)
        if result is None:
            return
        yield result
        size += result.size


def close(parts: Parts, phase: str) -> None:
    """Record that nothing of the phase is left."""
    with parts.grow({PHASE: phase, CLOSED: True}):
        pass


def is_closed(parts: Parts, phase: str) -> bool:
    return any(facts[PHASE] == phase and CLOSED in facts for facts in parts.facts)


def part_numbers(parts: Parts, phase: str) -> list[int]:
    """The finished parts of a phase, in order, without the mark of its end."""
    return [
        number
        for number, facts in enumerate(parts.facts)
        if facts[PHASE] == phase and CLOSED not in facts
    ]


def start_of(parts: Parts, phase: str) -> Place:
    """Where a pass goes on."""
    own = part_numbers(parts, phase)
    if not own:
        return START
    file, number = parts.facts[own[-1]][PLACE]
    return file, number


def total(parts: Parts, phase: str, name: str) -> Counter[str]:
    """The counter ``name`` of all parts of a phase together."""
    found: Counter[str] = Counter()
    for number in part_numbers(parts, phase):
        found.update(parts.facts[number][name])
    return found
