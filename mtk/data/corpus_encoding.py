"""From corpus files to the datasets of all keys: encode, write, count, report bad records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mtk.data.encoding import EncodedChunk, EncodingPlan, encode_chunks
from mtk.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from mtk.data.records import BadRecord, refusal
from mtk.data.sources import Chunk
from mtk.errors import DataError
from mtk.log import Progress

LISTED = 10_000


@dataclass
class CorpusCounts:
    """What was written, for the manifest. by_key: documents, sequences, tokens, text_bytes."""

    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    by_key: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())


class BadRecordList:
    """``P.bad_lines.jsonl``: the first 10,000 bad records, made when there is one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: IO[str] | None = None
        self._listed = 0

    def __enter__(self) -> BadRecordList:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, bad: BadRecord) -> None:
        if self._listed == LISTED:
            return
        if self._stream is None:
            self._stream = self._path.open("w", encoding="utf-8")
        self._stream.write(json.dumps(asdict(bad)) + "\n")
        self._listed += 1


def encode_corpus(
    chunks: Iterator[Chunk],
    plan: EncodingPlan,
    prefixes: dict[str, Path],
    vocab_size: int,
    *,
    workers: int,
    skip_bad: bool,
    bad_list: Path,
    progress: Progress,
) -> CorpusCounts:
    """Write ``prefixes[key]``.bin/.idx for every key of the plan.

    Raises DataError at the first bad record unless ``skip_bad``.
    """
    counts = CorpusCounts()
    text_bytes: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(prefixes[key], token_dtype(vocab_size)))
            for key in plan.keys
        }
        listed = stack.enter_context(BadRecordList(bad_list))
        encoded = encode_chunks(chunks, plan, workers)
        stack.callback(encoded.close)  # type: ignore[attr-defined]
        for chunk in encoded:
            _note_bad(chunk, counts, listed, skip_bad=skip_bad)
            for key, part in zip(plan.keys, chunk.keys, strict=True):
                writers[key].add_documents(part.tokens, part.lengths, part.sequences)
                text_bytes[key] += part.text_bytes
            first = writers[plan.keys[0]]
            progress.advance(chunk.done / 1e6, documents=f"{first.num_documents:,}")
        for key, writer in writers.items():
            counts.by_key[key] = {
                "documents": writer.num_documents,
                "sequences": writer.num_sequences,
                "tokens": writer.num_tokens,
                "text_bytes": text_bytes[key],
            }
    return counts


def _note_bad(
    chunk: EncodedChunk, counts: CorpusCounts, listed: BadRecordList, *, skip_bad: bool
) -> None:
    counts.records += chunk.records
    for bad in chunk.bad:
        if not skip_bad:
            raise refusal(bad)
        counts.bad[bad.reason] += 1
        listed.add(bad)


def check_counts(counts: CorpusCounts, max_bad_fraction: float | None) -> None:
    """A corpus that is empty, or worse than allowed, is refused. Raises DataError."""
    bad = ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.bad.items()))
    if counts.records == 0:
        raise DataError("the input holds no records: every file is empty. Correct --input.")
    if counts.num_bad == counts.records:
        raise DataError(f"all {counts.records:,} records are bad ({bad}). Correct --json-keys.")
    if max_bad_fraction is not None and counts.num_bad > max_bad_fraction * counts.records:
        raise DataError(
            f"{counts.num_bad:,} of {counts.records:,} records are bad ({bad}), more than "
            f"--max-bad-fraction {max_bad_fraction} allows."
        )
    empty = [key for key, numbers in counts.by_key.items() if numbers["tokens"] == 0]
    if empty:
        documents = counts.by_key[empty[0]]["documents"]
        raise DataError(
            f"the {documents:,} documents of {empty[0]!r} hold no token at all: there is nothing "
            f"to train on. Correct --json-keys or the corpus."
        )


def bad_metrics(counts: CorpusCounts) -> dict[str, Any]:
    return {
        "records": counts.records,
        "bad_records": counts.num_bad,
        "bad_by_reason": dict(counts.bad),
    }
