"""Chunks of raw records to token arrays, in this process or in a pool, always in order.

Every chunk is encoded by itself, so the result does not depend on the number of workers.
At most a few chunks a worker are in flight: memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtk.data.checked_encoding import CheckedEncoder, EngineMismatchError
from mtk.data.indexed_dataset import token_dtype
from mtk.data.records import BadRecord, RecordError, Texts, bad_record, parse_record
from mtk.data.sources import Chunk, Place
from mtk.data.workers import in_order
from mtk.errors import DataError, MtkError
from mtk.tokenizers import Tokenizer, load_tokenizer
from mtk.tokenizers.engines import AUTO


class Splitter(Protocol):
    """Cuts a text into sentences; hashable and picklable, as workers receive it."""

    def split(self, text: str) -> list[str]: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class EncodingPlan:
    """What to do with every record. tokenizer: folder it was saved in. engine: what encodes,
    see ``mtk.tokenizers.engines``."""

    tokenizer: str
    keys: tuple[str, ...]
    append_eod: bool
    splitter: Splitter | None = None
    engine: str = AUTO


@dataclass(frozen=True)
class EncodedKey:
    """Documents of one key: tokens [T], lengths [S] (sum T), sequences [D] (sum S)."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    text_bytes: int


@dataclass(frozen=True)
class EncodedChunk:
    """By key in the plan's order, and the records that were left out.

    done: share of the file on disk, size: of the records, both in bytes. end: the last record.
    engine: what encoded. compared: records of which the tokenizer gave the same ids.
    """

    keys: tuple[EncodedKey, ...]
    bad: tuple[BadRecord, ...]
    records: int
    done: int
    size: int
    end: Place
    engine: str
    compared: int


class Encoder:
    """Encodes chunks with one tokenizer.

    Sentences without tokens are dropped; EOD goes behind the last token of a document that
    has any and is part of its last sentence; an empty document stays, without sequences.
    """

    def __init__(self, plan: EncodingPlan, tokenizer: Tokenizer) -> None:
        self._plan, self._tokenizer = plan, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._encoder = CheckedEncoder(tokenizer, plan.engine)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Raises EngineMismatchError, see :class:`CheckedEncoder`."""
        before = self._encoder.compared
        documents: list[Texts] = []
        bad: list[tuple[int, BadRecord]] = []
        places: list[int] = []
        for index, raw in enumerate(chunk.records):
            try:
                documents.append(parse_record(raw, self._plan.keys, plain=chunk.plain))
                places.append(index)
            except RecordError as error:
                bad.append((index, bad_record(chunk, index, error)))
        try:
            keys = self._encode_keys(documents, chunk, places)
        except DataError:
            documents, places, more = self._without_refused(chunk, documents, places)
            bad = sorted([*bad, *more], key=lambda item: item[0])
            keys = self._encode_keys(documents, chunk, places)
        return EncodedChunk(
            keys,
            tuple(b for _, b in bad),
            len(chunk.records),
            chunk.done,
            sum(map(len, chunk.records)),
            chunk.end,
            self._encoder.engine,
            self._encoder.compared - before,
        )

    def _without_refused(
        self, chunk: Chunk, documents: list[Texts], places: list[int]
    ) -> tuple[list[Texts], list[int], list[tuple[int, BadRecord]]]:
        """The documents that the tokenizer accepts one by one, and the others' places."""
        kept, at, bad = [], [], []
        for document, index in zip(documents, places, strict=True):
            try:
                self._encode_keys([document], chunk, [index])
                kept.append(document)
                at.append(index)
            except DataError as error:
                refused = RecordError("not tokenizable", str(error).rstrip("."))
                bad.append((index, bad_record(chunk, index, refused)))
        return kept, at, bad

    def _encode_keys(
        self, documents: list[Texts], chunk: Chunk, places: list[int]
    ) -> tuple[EncodedKey, ...]:
        numbers = [chunk.numbers[index] for index in places]
        return tuple(
            self._encode_key([document[position] for document in documents], numbers, chunk.file)
            for position in range(len(self._plan.keys))
        )

    def _sentences(self, value: str | list[str]) -> list[str]:
        if isinstance(value, list):
            return value
        return [value] if self._plan.splitter is None else self._plan.splitter.split(value)

    def _encode_key(
        self, values: list[str | list[str]], numbers: list[int], file: str
    ) -> EncodedKey:
        text_bytes = sum(_bytes(text) for v in values for text in ([v] if type(v) is str else v))
        documents = [self._sentences(value) for value in values]
        ids, lengths = self._encoder.encode(documents, numbers, file)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokenizer.vocab_size:
            raise MtkError(
                f"the tokenizer gave the id {int(ids.max())}, outside its vocabulary of "
                f"{self._tokenizer.vocab_size}; its files do not belong together."
            )
        texts = np.fromiter(map(len, documents), np.int64, len(documents))
        eod = self._tokenizer.eod if self._plan.append_eod else None
        return arranged(ids.astype(self._dtype), lengths, texts, eod, text_bytes)


def arranged(
    tokens: npt.NDArray[Any],
    lengths: npt.NDArray[np.int64],
    texts: npt.NDArray[np.int64],
    eod: int | None,
    text_bytes: int = 0,
) -> EncodedKey:
    """Texts [S] with ``lengths`` to sequences, ``texts`` [D] of them a document: those without
    tokens are dropped, and EOD follows the last one that a document keeps."""
    kept = lengths > 0
    document = np.repeat(np.arange(len(texts)), texts)
    sequences = np.bincount(document[kept], minlength=len(texts)).astype(np.int64)
    lengths = lengths[kept]
    if eod is None:
        return EncodedKey(tokens, lengths, sequences, text_bytes)
    last = np.cumsum(sequences)[sequences > 0] - 1
    places = np.cumsum(lengths)[last]  # in front of these tokens
    lengths[last] += 1
    return EncodedKey(np.insert(tokens, places, eod), lengths, sequences, text_bytes)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def encode_chunks(
    chunks: Iterator[Chunk], plan: EncodingPlan, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Encode every chunk, in order, with ``workers`` processes (1: in this process).

    Raises WorkerError if a worker dies or fails, EngineMismatchError if the plan's engine is
    not to be trusted.
    """
    work: Callable[[Chunk], EncodedChunk] = partial(_encode_in_worker, plan)
    if workers == 1:
        work = Encoder(plan, load_tokenizer(plan.tokenizer)).encode
    raises = (EngineMismatchError,)
    return in_order(work, chunks, workers, who="a preprocessing worker", raises=raises)


@lru_cache(maxsize=1)
def _worker_encoder(plan: EncodingPlan) -> Encoder:
    return Encoder(plan, load_tokenizer(plan.tokenizer))


def _encode_in_worker(plan: EncodingPlan, chunk: Chunk) -> EncodedChunk:
    return _worker_encoder(plan).encode(chunk)
