"""What a dataset holds: documents, lengths, token frequencies. Reads every token once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from mtk.log import Progress

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
BLOCK = 1 << 20  # tokens counted at a time


@dataclass(frozen=True)
class Lengths:
    """Tokens of documents or sequences. percentiles: the length that so many in a hundred do
    not exceed (0: the shortest), each one that occurs; empty where there is nothing."""

    count: int
    empty: int
    mean: float
    percentiles: Mapping[int, int]

    @property
    def empty_share(self) -> float:
        return self.empty / self.count if self.count else 0.0


@dataclass(frozen=True)
class TokenCounts:
    """How often ids occur. vocab_size, eod: of the tokenizer; None if it is not known.

    used: ids that occur. unused: those of the vocabulary that do not. outside: tokens whose id
    is below 0 or not in the vocabulary. eod_count: how often EOD occurs; unended: documents with
    tokens whose last is not EOD. common: the ids that occur most, with how often.
    """

    vocab_size: int | None
    eod: int | None
    used: int
    unused: int | None
    outside: int
    eod_count: int | None
    unended: int | None
    common: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Statistics:
    """bytes: of both files. tokens_of: None if the tokens were not read."""

    prefix: str
    dtype: str
    tokens: int
    bytes: int
    documents: Lengths
    sequences: Lengths
    tokens_of: TokenCounts | None

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        for name in ("documents", "sequences"):
            plain[name]["empty_share"] = getattr(self, name).empty_share
        return plain


def document_lengths(dataset: IndexedDataset) -> npt.NDArray[np.int64]:
    """int64 [documents]: tokens of each."""
    ends = np.concatenate(([0], np.cumsum(dataset.sizes, dtype=np.int64)))
    lengths: npt.NDArray[np.int64] = np.diff(ends[dataset.document_indices])
    return lengths


def lengths_of(values: npt.NDArray[np.integer[Any]]) -> Lengths:
    """Percentiles and mean of lengths."""
    if not len(values):
        return Lengths(0, 0, 0.0, {})
    found = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
    percentiles = {p: int(v) for p, v in zip(PERCENTILES, found, strict=True)}
    return Lengths(len(values), int((values == 0).sum()), float(values.mean()), percentiles)


def statistics(
    dataset: IndexedDataset,
    *,
    vocab_size: int | None = None,
    eod: int | None = None,
    count_tokens: bool = True,
    common: int = 10,
    progress: Progress | None = None,
) -> Statistics:
    """All figures of a dataset. count_tokens: read the tokens too, about 200 million a second
    and core; common: how many of the most frequent ids to name."""
    files = (bin_path(dataset.prefix), idx_path(dataset.prefix))
    return Statistics(
        prefix=str(dataset.prefix),
        dtype=dataset.dtype.name,
        tokens=dataset.num_tokens,
        bytes=sum(Path(file).stat().st_size for file in files),
        documents=lengths_of(document_lengths(dataset)),
        sequences=lengths_of(dataset.sizes),
        tokens_of=_counted(dataset, vocab_size, eod, common, progress) if count_tokens else None,
    )


def token_histogram(
    dataset: IndexedDataset, progress: Progress | None = None
) -> tuple[npt.NDArray[np.int64], int]:
    """int64 [highest id + 1]: how often each id occurs; and how many tokens are below 0."""
    counts = np.zeros(0, dtype=np.int64)
    negative = 0
    tokens = dataset.tokens
    for begin in range(0, len(tokens), BLOCK):
        block = tokens[begin : begin + BLOCK]
        if block.dtype.kind == "i" and int(block.min()) < 0:
            negative += int((block < 0).sum())
            block = block[block >= 0]
        found = np.bincount(block)
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
        if progress is not None:
            progress.advance(len(block) / 1e6)
    return counts, negative


def _counted(
    dataset: IndexedDataset,
    vocab_size: int | None,
    eod: int | None,
    common: int,
    progress: Progress | None,
) -> TokenCounts:
    counts, negative = token_histogram(dataset, progress)
    outside, unused = negative, None
    if vocab_size is not None:
        outside += int(counts[vocab_size:].sum())
        unused = vocab_size - int(np.count_nonzero(counts[:vocab_size]))
    order = np.argsort(-counts, kind="stable")[:common]
    most = tuple((int(i), int(counts[i])) for i in order if counts[i])
    eod_count = unended = None
    if eod is not None:
        eod_count = int(counts[eod]) if eod < len(counts) else 0
        unended = _not_ended_by(dataset, eod)
    used = int(np.count_nonzero(counts))
    return TokenCounts(vocab_size, eod, used, unused, outside, eod_count, unended, most)


def _not_ended_by(dataset: IndexedDataset, eod: int) -> int:
    """Documents with tokens whose last one is not EOD."""
    ends = np.concatenate(([0], np.cumsum(dataset.sizes, dtype=np.int64)))
    bounds = ends[dataset.document_indices]
    last = bounds[1:][np.diff(bounds) > 0] - 1
    parts = (last[begin : begin + BLOCK] for begin in range(0, len(last), BLOCK))
    return sum(int((dataset.tokens[part] != eod).sum()) for part in parts)
