"""Second pass of the search for duplicates: documents that share a band are compared.

Band by band, documents with the same hash make a bucket. The first of a bucket is compared with
all others by their whole sets of shingles; those that are alike are done with, and the first
of the rest is next. What earlier parts of the work have joined is not compared again. So many
copies of one page cost one comparison each, not one a pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.artifacts.parts import Parts
from mtk.curation.groups import Groups
from mtk.curation.passes import PHASE, close, is_closed, part_numbers
from mtk.curation.shingles import Hashes, Measure, Unit, shingle_hashes, similarity
from mtk.curation.signing import BANDS, NO_BAND, Lines, SignedParts
from mtk.curation.workers import in_order
from mtk.log import Progress

MATCH = "match"
PAIRS = "pairs.npy"
PAIR = np.dtype([("first", np.int64), ("second", np.int64), ("similarity", np.float64)])
TASK_DOCUMENTS = 256  # documents of the buckets that a worker gets at a time
PART_DOCUMENTS = 100_000  # documents of the buckets of one part
CACHED = 64  # sets of shingles


@dataclass(frozen=True)
class MatchPlan:
    """How the documents of a bucket are compared. folders: of the signed parts. listed,
    joined: similarity above which a pair is recorded, and from which it is a group. pivots: how
    many documents of a bucket are compared with all others; 0 is no limit."""

    folders: tuple[str, ...]
    key: str
    width: int
    unit: Unit
    measure: Measure
    listed: float
    joined: float
    pivots: int

    def open(self) -> Callable[[Task], Matches]:
        lines = Lines(self.folders)

        @lru_cache(CACHED)
        def shingles(place: tuple[int, int]) -> Hashes:
            text = text_of(json.loads(lines[place])[self.key])
            return np.unique(shingle_hashes(text, self.width, self.unit))

        return lambda task: _compare(task, shingles, self)


@dataclass(frozen=True)
class Member:
    """A document of a bucket. group: the first document of what it is known to belong to."""

    document: int
    place: tuple[int, int]
    group: int


Task = tuple[tuple[Member, ...], ...]  # buckets


@dataclass(frozen=True)
class Matches:
    """pairs: (first, second, similarity). cut: buckets in which the limit of pivots was met."""

    pairs: tuple[tuple[int, int, float], ...]
    compared: int
    cut: int


def text_of(value: Any) -> str:
    """The text of a checked field; ready-made sentences are joined."""
    return value if isinstance(value, str) else " ".join(value)


def _compare(task: Task, shingles: Callable[[tuple[int, int]], Hashes], plan: MatchPlan) -> Matches:
    pairs: list[tuple[int, int, float]] = []
    compared = cut = 0
    for bucket in task:
        rest, rounds = bucket, 0
        while len(rest) > 1:
            if plan.pivots and rounds == plan.pivots:
                cut += 1
                break
            rounds += 1
            pivot, groups = rest[0], {rest[0].group}
            for other in rest[1:]:
                if other.group in groups:
                    continue
                found = similarity(shingles(pivot.place), shingles(other.place), plan.measure)
                compared += 1
                if found > plan.listed:
                    pairs.append((pivot.document, other.document, found))
                if found >= plan.joined:
                    groups.add(other.group)
            # Who has joined the pivot is represented by it.
            rest = tuple(member for member in rest[1:] if member.group not in groups)
    return Matches(tuple(pairs), compared, cut)


def match(
    parts: Parts,
    signed: SignedParts,
    groups: Groups,
    plan: MatchPlan,
    *,
    bands: int,
    alone: npt.NDArray[np.bool_],
    workers: int,
    progress: Progress,
) -> None:
    """Compare all buckets of all bands and join ``groups``.

    alone: [N] documents that are compared; the others are copies of one. Each part holds the
    pairs of some buckets of one band, and begins with the groups that all parts before have
    found, so the result does not depend on the number of workers.
    """
    done = dict.fromkeys(range(bands), 0)
    for number in part_numbers(parts, MATCH):
        done[parts.facts[number]["band"]] = parts.facts[number]["end"]
        join_pairs(groups, np.load(parts.part(number) / PAIRS), plan.joined)
    if is_closed(parts, MATCH):
        return
    latest = max((parts.facts[n]["band"] for n in part_numbers(parts, MATCH)), default=0)
    for band in range(latest, bands):
        order, bounds = buckets(signed.column(BANDS, band), alone)
        first = done[band]
        while first < len(bounds):
            end = _part_end(bounds, first)
            facts: dict[str, Any] = {PHASE: MATCH, "band": band, "end": end}
            with parts.grow(facts) as folder:
                tasks = _tasks(signed, groups, order, bounds[first:end])
                found = list(in_order(tasks, plan, workers))
                pairs = np.array([pair for one in found for pair in one.pairs], PAIR)
                np.save(folder / PAIRS, pairs)
                facts["compared"] = sum(one.compared for one in found)
                facts["cut"] = sum(one.cut for one in found)
            join_pairs(groups, pairs, plan.joined)
            first = end
        progress.advance(1)
    close(parts, MATCH)


def join_pairs(groups: Groups, pairs: npt.NDArray[Any], joined: float) -> None:
    """Join those that are as similar as a group asks for."""
    for pair in pairs[pairs["similarity"] >= joined]:
        groups.join(int(pair["first"]), int(pair["second"]))


def buckets(
    hashes: Hashes, alone: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Documents ordered by the hash of a band, and [B, 2] where in that order each bucket of
    two or more begins and ends. Inside a bucket documents are in order."""
    found = np.flatnonzero(alone & (hashes != NO_BAND))
    order = found[np.argsort(hashes[found], kind="stable")]
    values = hashes[order]
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    starts = np.concatenate([[0], edges])
    ends = np.concatenate([edges, [len(order)]])
    several = ends - starts > 1
    return order, np.stack([starts[several], ends[several]], axis=1)


def _part_end(bounds: npt.NDArray[np.int64], first: int) -> int:
    """Behind the last bucket of a part: enough documents, or the end of the band."""
    sizes = np.cumsum(bounds[first:, 1] - bounds[first:, 0])
    return min(len(bounds), first + int(np.searchsorted(sizes, PART_DOCUMENTS)) + 1)


def _tasks(
    signed: SignedParts,
    groups: Groups,
    order: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
) -> Iterator[Task]:
    waiting: list[tuple[Member, ...]] = []
    size = 0
    for start, end in bounds.tolist():
        documents = order[start:end]
        firsts = [groups.first(document) for document in documents.tolist()]
        if len(set(firsts)) == 1:
            continue
        waiting.append(_members(documents, signed.locate(documents), firsts))
        size += len(documents)
        if size >= TASK_DOCUMENTS:
            yield tuple(waiting)
            waiting, size = [], 0
    if waiting:
        yield tuple(waiting)


def _members(
    documents: npt.NDArray[np.int64], places: Sequence[tuple[int, int]], firsts: Sequence[int]
) -> tuple[Member, ...]:
    found = zip(documents.tolist(), places, firsts, strict=True)
    return tuple(Member(document, place, first) for document, place, first in found)
