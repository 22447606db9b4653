"""First pass of the search for duplicates: signatures, and a copy to look texts up in.

Of every part of the input there are ``lines`` (the records, one a line, uncompressed) and
arrays of its documents: where their lines begin, digests of their texts, hashes of their
bands, which records they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.curation.output import Sink
from mtk.curation.pages import Place, Stretch, open_page
from mtk.curation.shingles import Hashes, MinHash, Unit, shingle_hashes
from mtk.curation.sifting import BadLines, Reporting, bad_lines
from mtk.data.records import BadRecord, RecordError, bad_record

LINES, STARTS, DIGESTS, BANDS = "lines", "starts.npy", "digests.npy", "bands.npy"
PLACES = "places.npy"  # [N, 2] index of the file, number of the record
NO_BAND = np.uint64(0)  # of a text without a shingle


@dataclass(frozen=True)
class SignPlan:
    """How texts are compared: shingles of ``width`` units, and their minima."""

    key: str
    width: int
    unit: Unit
    minhash: MinHash

    def open(self) -> Callable[[Stretch], Signed]:
        return lambda stretch: sign(stretch, self)


@dataclass(frozen=True)
class Signed:
    """Of one stretch: N documents. digests [N, 2] of whole texts, bands [N, bands]."""

    end: Place
    size: int
    done: int
    records: int
    bad: list[BadRecord]
    lines: list[bytes]
    numbers: list[int]
    digests: Hashes
    bands: Hashes


def sign(stretch: Stretch, plan: SignPlan) -> Signed:
    """Digest and band hashes of every good record."""
    chunk = stretch.chunk
    bad, lines, numbers, shingles, packed = [], [], [], [], []
    for index, number in enumerate(chunk.numbers):
        try:
            page = open_page(chunk, index, plan.key)
        except RecordError as error:
            bad.append(bad_record(chunk, index, error))
            continue
        lines.append(page.line())
        numbers.append(number)
        packed.append(hashlib.blake2b(page.text.encode(), digest_size=16).digest())
        shingles.append(shingle_hashes(page.text, plan.width, plan.unit))
    bands = plan.minhash.band_hashes(plan.minhash.signatures(shingles)) | np.uint64(1)
    bands[[not len(hashes) for hashes in shingles]] = NO_BAND
    digests = np.frombuffer(b"".join(packed), np.uint64).reshape(-1, 2)
    size, records = stretch.size, len(chunk.records)
    return Signed(stretch.end, size, chunk.done, records, bad, lines, numbers, digests, bands)


class SignedWriter:
    """The files of one part. Its arrays are held until it is complete: about 120 bytes a
    document with 10 bands."""

    def __init__(self, folder: Path, lines: Sink, bad: BadLines) -> None:
        self._folder, self._lines, self._bad = folder, lines, bad
        self._documents = 0
        self._sizes: list[npt.NDArray[np.int64]] = []
        self._places: list[npt.NDArray[np.int64]] = []
        self._digests: list[Hashes] = []
        self._bands: list[Hashes] = []
        self._counts = {"records": 0, "bytes_read": 0}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "documents": self._documents,
            "counts": self._counts,
            "bad": dict(self._bad.by_reason),
        }

    def add(self, found: Signed) -> None:
        """Raises DataError at a bad record unless they are skipped."""
        self._bad.add(found.bad)
        self._counts["records"] += found.records
        self._counts["bytes_read"] += found.size
        for line in found.lines:
            self._lines.write(line + b"\n")
        self._documents += len(found.lines)
        self._sizes.append(np.array([len(line) + 1 for line in found.lines], np.int64))
        numbers = np.array(found.numbers, np.int64)
        self._places.append(np.stack([np.full_like(numbers, found.end[0]), numbers], axis=1))
        self._digests.append(found.digests)
        self._bands.append(found.bands)

    def save(self) -> None:
        ends = np.cumsum(np.concatenate(self._sizes))
        np.save(self._folder / STARTS, np.concatenate([np.zeros(1, np.int64), ends]))
        np.save(self._folder / PLACES, np.concatenate(self._places))
        np.save(self._folder / DIGESTS, np.concatenate(self._digests))
        np.save(self._folder / BANDS, np.concatenate(self._bands))


class SignWriting:
    """Opens the files of a part."""

    def __init__(self, reporting: Reporting) -> None:
        self._reporting = reporting

    @contextmanager
    def __call__(self, folder: Path) -> Iterator[SignedWriter]:
        with ExitStack() as stack:
            lines = stack.enter_context((folder / LINES).open("wb"))
            bad = stack.enter_context(bad_lines(folder, self._reporting))
            writer = SignedWriter(folder, lines, bad)
            yield writer
            writer.save()


class SignedParts:
    """The documents of all parts, numbered from 0 in the order of the input."""

    def __init__(self, folders: list[Path], documents: list[int]) -> None:
        self.folders = folders
        self.firsts = np.concatenate([[0], np.cumsum(documents, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def column(self, name: str, column: int) -> Hashes:
        """[N] one column of an array of all parts."""
        arrays = [np.load(folder / name, mmap_mode="r")[:, column] for folder in self.folders]
        return np.concatenate([np.zeros(0, np.uint64), *arrays])

    def locate(self, documents: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """(part, document of the part) of each."""
        parts = np.searchsorted(self.firsts, documents, side="right") - 1
        return list(zip(parts.tolist(), (documents - self.firsts[parts]).tolist(), strict=True))


class Lines:
    """Lines of signed parts by their place. Opened files stay open: one a part."""

    def __init__(self, folders: tuple[str, ...]) -> None:
        self._folders = folders
        self._opened: dict[int, tuple[Any, Any]] = {}

    def __getitem__(self, place: tuple[int, int]) -> bytes:
        part, document = place
        if part not in self._opened:
            folder = Path(self._folders[part])
            lines = np.memmap(folder / LINES, np.uint8, "r")
            self._opened[part] = lines, np.load(folder / STARTS, mmap_mode="r")
        lines, starts = self._opened[part]
        found: bytes = lines[starts[document] : starts[document + 1] - 1].tobytes()
        return found
