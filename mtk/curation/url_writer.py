"""Writing URLs so that none comes twice, also over interrupted runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mtk.artifacts.parts import Parts
from mtk.curation.passes import part_numbers
from mtk.curation.seen import Digests, Seen
from mtk.curation.sifting import Dropped, Reporting, Sifted, SiftedWriter, sifted_writer
from mtk.curation.urls import DUPLICATE

SEEN = "seen.npy"


def seen_before(parts: Parts, phase: str) -> Seen:
    """What the finished parts have written."""
    seen = Seen()
    for number in part_numbers(parts, phase):
        seen.add(np.load(parts.part(number) / SEEN))
    return seen


class UrlWriting:
    """Opens writers that drop what any part before has; call it once for each part, in order."""

    def __init__(self, reporting: Reporting, seen: Seen) -> None:
        self._reporting, self._seen = reporting, seen

    @contextmanager
    def __call__(self, folder: Path) -> Iterator[_UrlWriter]:
        with sifted_writer(folder, self._reporting) as writer:
            own = _UrlWriter(writer, self._seen)
            yield own
        np.save(folder / SEEN, np.concatenate([np.zeros(0, np.uint64), *own.written]))


class _UrlWriter:
    def __init__(self, writer: SiftedWriter, seen: Seen) -> None:
        self._writer, self._seen = writer, seen
        self.written: list[Digests] = []

    @property
    def facts(self) -> dict[str, Any]:
        return self._writer.facts

    def add(self, found: Sifted) -> None:
        values = np.array(found.digests, np.uint64)
        new = self._seen.add(values)
        self.written.append(values[new])
        kept = []
        for index, fresh in enumerate(new):
            if fresh:
                kept.append(found.kept[index])
            else:
                name, number = found.names[index]
                found.dropped.append(Dropped(name, found.file, number, DUPLICATE, ""))
        found.kept = kept
        found.dropped.sort(key=lambda dropped: dropped.number)
        self._writer.add(found)
