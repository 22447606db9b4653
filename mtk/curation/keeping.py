"""Last pass of the search for duplicates: the first document of every group is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.artifacts.parts import Parts
from mtk.curation.matching import MATCH, PAIRS
from mtk.curation.output import packed
from mtk.curation.pages import name_of_record
from mtk.curation.passes import PHASE, close, is_closed, part_numbers
from mtk.curation.sifting import KEPT, Dropped, Reporting, dropped_list
from mtk.curation.signing import DIGESTS, LINES, PLACES, Lines, SignedParts
from mtk.log import Progress

WRITE = "write"
EXACT, NEAR = "exact duplicate", "near-duplicate"


def copies(signed: SignedParts) -> npt.NDArray[np.int64]:
    """[N] the first document with the same text."""
    low, high = signed.column(DIGESTS, 0), signed.column(DIGESTS, 1)
    order = np.lexsort((low, high))  # stable: equal ones stay in the order of the input
    same = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    begins = np.flatnonzero(np.concatenate([np.ones(min(1, len(order)), np.bool_), ~same]))
    lengths = np.diff(np.append(begins, len(order)))
    firsts = np.empty(len(order), np.int64)
    firsts[order] = np.repeat(order[begins], lengths)
    return firsts


class Naming:
    """What documents are called in reports."""

    def __init__(self, signed: SignedParts, files: tuple[Path, ...], id_key: str) -> None:
        self._signed, self._files, self._id_key = signed, files, id_key
        self._lines = Lines(tuple(map(str, signed.folders)))
        self._places = [np.load(folder / PLACES, mmap_mode="r") for folder in signed.folders]

    def place(self, document: int) -> tuple[str, int]:
        """(file, number of the record)."""
        [(part, index)] = self._signed.locate(np.array([document]))
        file, number = self._places[part][index].tolist()
        return str(self._files[file]), number

    def name(self, document: int) -> str:
        [place] = self._signed.locate(np.array([document]))
        file, number = self.place(document)
        record = json.loads(self._lines[place])
        return name_of_record(record, self._id_key, f"{Path(file).name}:{number}")


def write_firsts(
    parts: Parts,
    signed: SignedParts,
    firsts: npt.NDArray[np.int64],
    exact: npt.NDArray[np.int64],
    naming: Naming,
    reporting: Reporting,
    progress: Progress,
) -> None:
    """One part for every signed part: its documents that are the first of their group.

    firsts, exact: [N] the first document of the group, and the first with the same text.
    """
    if is_closed(parts, WRITE):
        return
    for number in range(len(part_numbers(parts, WRITE)), len(signed.folders)):
        source = signed.folders[number]
        first = int(signed.firsts[number])
        facts: dict[str, Any] = {PHASE: WRITE}
        with parts.grow(facts) as folder:
            counts = {"pages_kept": 0, "records_written": 0, "bytes_written": 0}
            with (
                (source / LINES).open("rb") as lines,
                packed(folder / KEPT, reporting.suffix) as kept,
                dropped_list(folder, reporting) as dropped,
            ):
                for document, line in enumerate(lines, start=first):
                    if firsts[document] == document:
                        kept.write(line)
                        counts["pages_kept"] += 1
                        counts["bytes_written"] += len(line)
                    else:
                        dropped.add([_dropped(document, firsts, exact, naming, reporting)])
                counts["records_written"] = counts["pages_kept"]
                facts |= {"counts": counts, "dropped": dict(dropped.by_reason)}
        progress.advance((source / LINES).stat().st_size / 1e6)
    close(parts, WRITE)


def _dropped(
    document: int,
    firsts: npt.NDArray[np.int64],
    exact: npt.NDArray[np.int64],
    naming: Naming,
    reporting: Reporting,
) -> Dropped:
    first = int(firsts[document])
    # A copy of a document that is a near-duplicate itself has the text of none that is kept.
    reason = EXACT if exact[document] == first else NEAR
    if not reporting.list_dropped:
        return Dropped("", "", 0, reason, "")
    file, number = naming.place(document)
    return Dropped(naming.name(document), file, number, reason, f"of {naming.name(first)}")


def pair_lines(parts: Parts, naming: Naming) -> Iterator[bytes]:
    """JSON lines of all pairs that were found alike, as they were found."""
    for number in part_numbers(parts, MATCH):
        for pair in np.load(parts.part(number) / PAIRS):
            first, second = naming.name(int(pair["first"])), naming.name(int(pair["second"]))
            found = {"first": first, "second": second, "similarity": float(pair["similarity"])}
            yield json.dumps(found, ensure_ascii=False).encode() + b"\n"
