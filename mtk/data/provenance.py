"""Which record of the corpus a document was: file, line, bytes.

Datasets do not store it. Documents are in the order of the input, one for every record that was
not left out, so the corpus that the manifest names is read again, up to the last document asked
for, and its files are only believed with the digests that the manifest records.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, InputRecord, input_path
from mtk.data.dataset_artifact import DatasetInfo, open_dataset, tokenizer_folder
from mtk.data.indexed_dataset import IndexedDataset
from mtk.data.records import RecordError, parse_record
from mtk.data.sources import Chunk, read_chunks
from mtk.data.token_source import SampleDataset
from mtk.errors import ArtifactError, DataError
from mtk.tokenizers import Tokenizer, load_tokenizer

CORPUS = "corpus"
REFUSED = "not tokenizable"  # the reason by which records are left out that do parse


@dataclass(frozen=True)
class Origin:
    """A record of a corpus. unit: what ``number`` counts from 1: "line", "item" of an array,
    "row". begin, end: its bytes in the uncompressed file, -1 where rows have none. record: the
    bytes themselves, JSON unless ``plain``."""

    file: str
    unit: str
    number: int
    begin: int
    end: int
    record: bytes = b""
    plain: bool = False

    def __str__(self) -> str:
        place = f" (bytes {self.begin}..{self.end})" if self.begin >= 0 else ""
        return f"{self.file}, {self.unit} {self.number}{place}"

    def to_dict(self) -> dict[str, Any]:
        """Without the record."""
        names = ("file", "unit", "number", "begin", "end")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Origins:
    """found: by number of the document. unknown: why the others are not known; "" if all are."""

    found: Mapping[int, Origin]
    unknown: str = ""


def origins_of(dataset: SampleDataset, k: int) -> list[Origin]:
    """Where what sample ``k`` is made of was read, one entry for each of ``documents_of(k)`` if
    there are any; [] for datasets that were preprocessed, which :func:`find_origins` traces."""
    own = getattr(dataset, "origins_of", None)
    found: list[Origin] = [] if own is None else own(k)
    return found


def find_origins(
    info: DatasetInfo, documents: Collection[int], *, verify_digest: bool = True
) -> Origins:
    """The records that documents of a dataset were made of.

    verify_digest: hash the corpus' files before they are believed. Raises DataError for a
    corpus that cannot be read; one that is gone or has changed makes its documents unknown.
    """
    if not documents:
        return Origins({})
    if info.artifact is None:
        return Origins({}, f"{info.prefix} has no manifest that names its corpus")
    if info.artifact.stage == "merge":
        return _of_merged(info.artifact, documents, verify_digest)
    if info.artifact.stage != "preprocess":
        return Origins({}, f"{info.prefix} was not made by mtk preprocess from a corpus")
    try:
        files = _files(info.artifact, verify_digest)
    except ArtifactError as error:
        return Origins({}, str(error))
    gone = [record.path for record, path in files if path is None]
    if gone:
        return Origins({}, f"the corpus {gone[0]} is gone")
    return _read(info.artifact, [(r.path, p) for r, p in files if p is not None], documents)


def _of_merged(artifact: Artifact, documents: Collection[int], verify_digest: bool) -> Origins:
    """``mtk merge`` put the documents of its inputs behind each other, in their order."""
    found: dict[int, Origin] = {}
    reasons: list[str] = []
    first = 0
    for record in artifact.inputs:
        # The role names the dataset: an artifact may hold several, one a key.
        folder = Path(record.path).parent
        try:
            info = open_dataset(folder / record.role.removeprefix("dataset "))
        except (DataError, ArtifactError) as error:
            return Origins(found, f"what was merged is not there any more: {error}")
        if info.artifact is not None and info.artifact.digest != record.digest:
            return Origins(found, f"{info.prefix} is not the dataset that was merged")
        count = IndexedDataset(info.prefix).num_documents
        inside = [d - first for d in documents if first <= d < first + count]
        own = find_origins(info, inside, verify_digest=verify_digest)
        found |= {first + document: origin for document, origin in own.found.items()}
        reasons += [own.unknown] if own.unknown else []
        first += count
    return Origins(found, "; ".join(reasons))


def _files(artifact: Artifact, verify_digest: bool) -> list[tuple[InputRecord, Path | None]]:
    records = [r for r in artifact.inputs if r.role.split()[0] == CORPUS]
    return [(r, input_path(r, artifact.folder, verify_digest=verify_digest)) for r in records]


def _read(artifact: Artifact, files: list[tuple[str, Path]], documents: Collection[int]) -> Origins:
    config = artifact.config
    chunks = read_chunks(
        [path for _, path in files], tuple(config["json_keys"]), config["text_documents"]
    )
    recorded = {str(path): name for name, path in files}
    left_out = _LeftOut(artifact, recorded)
    wanted = sorted(set(documents), reverse=True)
    found: dict[int, Origin] = {}
    number = 0
    for chunk in chunks:
        for index in left_out.kept(chunk):
            if number == wanted[-1]:
                found[wanted.pop()] = _origin(chunk, index)
                if not wanted:
                    return Origins(found)
            number += 1
    return Origins(found, f"the corpus gives {number} documents, no document {wanted[-1]}")


def _origin(chunk: Chunk, index: int) -> Origin:
    begin, record = chunk.starts[index], chunk.records[index]
    end = begin + len(record) if begin >= 0 else -1
    number = chunk.numbers[index]
    return Origin(chunk.file, chunk.unit, number, begin, end, record, chunk.plain)


class _LeftOut:
    """Which records became no document.

    preprocess lists the first ones (``P.bad_lines.jsonl``), in order. Records after the last of
    an incomplete list are judged again.
    """

    def __init__(self, artifact: Artifact, recorded: Mapping[str, str]) -> None:
        self._keys = tuple(artifact.config["json_keys"])
        self._recorded = recorded
        count = artifact.metrics.get("bad_records", 0)
        name = artifact.path.name
        self._listed = _listed(artifact.folder / f"{name}.bad_lines.jsonl") if count else []
        self._listed.reverse()
        self._more = count > len(self._listed)
        self._tokenizer: Tokenizer | None = None
        if self._more and REFUSED in artifact.metrics.get("bad_by_reason", {}):
            self._tokenizer = load_tokenizer(artifact.folder / tokenizer_folder(name))

    def kept(self, chunk: Chunk) -> Iterator[int]:
        """The records of a chunk that did become one; chunks come in the order of the corpus."""
        if not self._listed and not self._more:
            yield from range(len(chunk.records))
            return
        for index, number in enumerate(chunk.numbers):
            if self._listed:
                file, left_out = self._listed[-1]
                if left_out == number and self._same(file, chunk.file):
                    self._listed.pop()
                    continue
            elif self._more and self._bad(chunk, index):
                continue
            yield index

    def _same(self, listed: str, file: str) -> bool:
        """Whether a name in the list is that of a file, which may have been moved since."""
        recorded = self._recorded[file]
        if listed == recorded:
            return True
        # Of a corpus that mtk wrote, the manifest records what its files begin with.
        return listed.startswith(recorded) and Path(listed).name == Path(file).name

    def _bad(self, chunk: Chunk, index: int) -> bool:
        try:
            texts = parse_record(chunk.records[index], self._keys, plain=chunk.plain)
        except RecordError:
            return True
        if self._tokenizer is None:
            return False
        try:
            for text in texts:
                self._tokenizer.encode_batch([text] if isinstance(text, str) else text)
        except DataError:
            return True
        return False


def _listed(path: Path) -> list[tuple[str, int]]:
    """File and number of the records in a list of bad ones, which need not be there."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(entry["file"], int(entry["number"])) for entry in map(json.loads, lines)]
