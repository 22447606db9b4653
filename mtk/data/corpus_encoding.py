"""A corpus to the datasets of all its keys, by parts: encode, write, count, list bad records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mtk.artifacts.parts import Parts
from mtk.data.encoding import EncodedChunk
from mtk.data.growing_dataset import GrowingDataset
from mtk.data.records import BadRecord, refusal
from mtk.data.sources import Place
from mtk.errors import DataError
from mtk.log import Progress

PART_BYTES = 64 << 20  # of records: what a kill costs at most
BAD = "bad.jsonl"
ZEROS = {"documents": 0, "sequences": 0, "tokens": 0, "text_bytes": 0}
LISTED = 10_000


@dataclass
class CorpusCounts:
    """What was written, for the manifest. by_key: documents, sequences, tokens, text_bytes.
    engines: what encoded; compared: records of which the tokenizer gave the same ids."""

    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    by_key: dict[str, dict[str, int]] = field(default_factory=dict)
    compared: int = 0
    engines: set[str] = field(default_factory=set)

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())


class BadRecordList:
    """The first 10,000 bad records, a JSON line each; made when there is one.

    listed: how many stand in parts before.
    """

    def __init__(self, path: Path, listed: int) -> None:
        self._path, self.listed = path, listed

    def add(self, bad: Sequence[BadRecord]) -> None:
        lines = [json.dumps(asdict(record)) + "\n" for record in bad[: LISTED - self.listed]]
        if lines:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
        self.listed += len(lines)


class CorpusParts:
    """A corpus encoded part by part into ``parts``, going on where these end.

    dtype: of the tokens. Use as a context manager.
    """

    def __init__(self, parts: Parts, keys: Sequence[str], dtype: np.dtype[Any]) -> None:
        self._parts, self._keys = parts, keys
        ends = parts.facts[-1]["bytes"] if len(parts) else [0] * len(keys)
        self._datasets = [
            GrowingDataset(parts.folder / f"{index}.bin", dtype, end)
            for index, end in enumerate(ends)
        ]
        self.documents = sum(facts["keys"][0]["documents"] for facts in parts.facts)

    def __enter__(self) -> CorpusParts:
        return self

    def __exit__(self, *error: object) -> None:
        for dataset in self._datasets:
            dataset.close()

    @property
    def after(self) -> Place | None:
        """The last record of what is finished."""
        return Place(**self._parts.facts[-1]["end"]) if len(self._parts) else None

    @property
    def done(self) -> int:
        """Bytes of the files on disk that are finished."""
        return sum(facts["done"] for facts in self._parts.facts)

    def add(self, encoded: Iterator[EncodedChunk], progress: Progress, *, skip_bad: bool) -> bool:
        """One more part, of about ``PART_BYTES`` of records; False if none was left.

        Raises DataError at the first bad record unless ``skip_bad``.
        """
        first = next(encoded, None)
        if first is None:
            return False
        facts: dict[str, Any] = {"records": 0, "done": 0, "compared": 0, "bad": {}}
        text_bytes = [0] * len(self._keys)
        bad: Counter[str] = Counter()
        with self._parts.grow(facts) as folder:
            listed = BadRecordList(folder / BAD, sum(f["listed"] for f in self._parts.facts))
            before, size = listed.listed, 0
            for chunk in chain([first], encoded):
                if chunk.bad and not skip_bad:
                    raise refusal(chunk.bad[0])
                bad.update(record.reason for record in chunk.bad)
                listed.add(chunk.bad)
                for index, (dataset, part) in enumerate(
                    zip(self._datasets, chunk.keys, strict=True)
                ):
                    dataset.add_documents(part.tokens, part.lengths, part.sequences)
                    text_bytes[index] += part.text_bytes
                for name in ("records", "done", "compared"):
                    facts[name] += getattr(chunk, name)
                self.documents += len(chunk.keys[0].sequences)
                progress.advance(chunk.done / 1e6, documents=f"{self.documents:,}")
                size += chunk.size
                if size >= PART_BYTES:
                    break
            keys = [d.finish_part(folder, str(i)) for i, d in enumerate(self._datasets)]
            facts |= {
                "end": asdict(chunk.end),
                "engine": chunk.engine,
                "bad": dict(bad),
                "listed": listed.listed - before,
                "bytes": [key.pop("bytes") for key in keys],
                "keys": [k | {"text_bytes": n} for k, n in zip(keys, text_bytes, strict=True)],
            }
        return True

    def publish(self, prefixes: Mapping[str, Path], bad_list: Path) -> CorpusCounts:
        """``prefixes[key]``.bin/.idx of every key and, if a record was bad, the list."""
        folders = [self._parts.part(index) for index in range(len(self._parts))]
        for index, key in enumerate(self._keys):
            self._datasets[index].publish(prefixes[key], folders, str(index))
        for folder in folders:
            if (folder / BAD).is_file():
                with bad_list.open("ab") as stream:
                    stream.write((folder / BAD).read_bytes())
        return self.counts()

    def counts(self) -> CorpusCounts:
        counts = CorpusCounts(by_key={key: dict(ZEROS) for key in self._keys})
        for facts in self._parts.facts:
            counts.records += facts["records"]
            counts.compared += facts["compared"]
            counts.bad.update(facts["bad"])
            counts.engines.add(facts["engine"])
            for key, numbers in zip(self._keys, facts["keys"], strict=True):
                for name, number in numbers.items():
                    counts.by_key[key][name] += number
        return counts


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
        "bad_by_reason": dict(sorted(counts.bad.items())),
    }
