"""Writing URLs so that none comes twice, also over interrupted runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mtk.artifacts.parts import Parts
from mtk.curation.pages import name_of_record
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

    def __init__(self, reporting: Reporting, seen: Seen, id_key: str) -> None:
        self._reporting, self._seen, self._id_key = reporting, seen, id_key

    @contextmanager
    def __call__(self, folder: Path) -> Iterator[_UrlWriter]:
        with sifted_writer(folder, self._reporting) as writer:
            own = _UrlWriter(writer, self._seen, self._id_key)
            yield own
        np.save(folder / SEEN, np.concatenate([np.zeros(0, np.uint64), *own.written]))


class _UrlWriter:
    def __init__(self, writer: SiftedWriter, seen: Seen, id_key: str) -> None:
        self._writer, self._seen, self._id_key = writer, seen, id_key
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
                url, number = found.sources[index]
                name = _name(found.kept[index][0], url, self._id_key)
                found.dropped.append(Dropped(name, found.file, number, DUPLICATE, ""))
        found.kept = kept
        found.dropped.sort(key=lambda dropped: dropped.number)
        self._writer.add(found)


def _name(line: bytes, url: str, id_key: str) -> str:
    """A bare URL, or a record without the field, is called by its URL."""
    record = json.loads(line) if line.startswith(b"{") else {}
    return name_of_record(record, id_key, url.strip())
