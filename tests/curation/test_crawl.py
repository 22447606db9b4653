"""Every filter finds what was planted for it in a crawl of real text, and little else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtk.config import make
from mtk.config.curate_web import CurateWebConfig
from mtk.curation.repair import tidy_whitespace
from stages.curate_all import run
from tests.curation import plain
from tests.curation.crawl import PLANTED, Crawl, make_crawl
from tests.curation.inputs import QUIET, read_lines

LEAST = 0.99
# case -> (step, reason)
FILTERS = {
    "domain": ("urls", "blocked domain"),
    "extension": ("urls", "blocked extension"),
    "short url": ("urls", "too short"),
    "malformed": ("urls", "malformed"),
    "same url": ("urls", "duplicate URL"),
    "javascript": ("clean", "javascript notice"),
    "short": ("clean", "too few tokens"),
    "foreign": ("clean", "other language"),
    "exact": ("duplicates", "exact duplicate"),
    "near": ("duplicates", "near-duplicate"),
}


@dataclass(frozen=True)
class Curated:
    crawl: Crawl
    folder: Path
    metrics: dict[str, Any]

    def dropped(self, step: str, reason: str) -> set[str]:
        lines = read_lines(self.folder / f"out.{step}.dropped.jsonl")
        return {line["id"] for line in lines if line["reason"] == reason}

    def after(self, step: str) -> dict[str, dict[str, str]]:
        [path] = (self.folder / "out.steps").glob(f"*_{step}.jsonl")
        return {record["id"]: record for record in read_lines(path)}

    def planted(self, case: str) -> set[str]:
        return {record["id"] for record in self.crawl.records if record["case"] == case}


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Curated]:
    folder = tmp_path_factory.mktemp("crawl")
    crawl, evaluation = make_crawl().write(folder)
    config = make(
        CurateWebConfig,
        input=[str(crawl)],
        output=str(folder / "out.jsonl"),
        evaluation_lambada=[str(evaluation)],
        id_key="id",
        list_dropped=True,
        list_pairs=True,
        keep_steps=True,
        workers=1,
    )
    artifact = run(config, QUIET)
    yield Curated(make_crawl(), folder, dict(artifact.metrics))


def test_the_crawl_holds_what_it_says() -> None:
    crawl = make_crawl()
    found = Counter(record["case"] for record in crawl.records)
    assert len(crawl.records) >= 1000
    assert {case: found[case] for case in PLANTED} == PLANTED
    assert len({record["id"] for record in crawl.records}) == len(crawl.records)


@pytest.mark.parametrize("case", FILTERS)
def test_recall_and_precision(curated: Curated, case: str) -> None:
    step, reason = FILTERS[case]
    dropped, planted = curated.dropped(step, reason), curated.planted(case)
    right = dropped & planted if step != "duplicates" else _true_duplicates(curated, dropped)
    recall = len(dropped & planted) / len(planted)
    precision = len(right) / len(dropped) if dropped else 0.0
    print(f"{step}, {reason}: recall {recall:.3f} of {len(planted)}, precision {precision:.3f}")
    assert recall >= LEAST and precision >= LEAST


def _true_duplicates(curated: Curated, dropped: set[str]) -> set[str]:
    """Those that a page which was kept resembles by 0.7, by sets of strings. (Pages of Python's
    documentation may be copies of each other that nobody planted.)"""
    before, kept = curated.after("clean"), curated.after("duplicates")
    lines = read_lines(curated.folder / "out.duplicates.dropped.jsonl")
    found = set()
    for line in lines:
        if line["id"] in dropped:
            first = line["detail"].removeprefix("of ")
            one, other = (plain.shingles(before[name]["text"]) for name in (line["id"], first))
            if first in kept and plain.jaccard(one, other) >= 0.7:
                found.add(line["id"])
    return found


def test_pages_without_a_fault_stay(curated: Curated) -> None:
    kept = {name.partition("/")[0] for name in curated.after("decontaminate")}
    false = [
        name
        for name in curated.planted("good") | curated.planted("similar")
        if name not in kept and not _explained(curated, name)
    ]
    share = len(false) / (PLANTED["similar"] + len(curated.planted("good")))
    print(f"good pages lost: {len(false)} ({share:.4f}): {false[:5]}")
    assert share <= 1 - LEAST


def _explained(curated: Curated, name: str) -> bool:
    """A good page may be a copy of another, or hold a passage of the evaluation set by itself."""
    for reason in ("exact duplicate", "near-duplicate"):
        dropped = curated.dropped("duplicates", reason) & {name}
        if _true_duplicates(curated, dropped):
            return True
    page = curated.after("duplicates").get(name)
    ngrams = plain.evaluation_ngrams(curated.crawl.passages)
    return page is not None and bool(plain.places(page["text"], ngrams))


def test_mojibake_is_undone(curated: Curated) -> None:
    cleaned = curated.after("clean")
    right = 0
    for record in curated.crawl.records:
        if record["case"] == "mojibake":
            assert record["text"] != record["of"]
            straight = record["of"].translate(str.maketrans("“”’", '""\''))
            found = cleaned.get(record["id"], {"text": ""})["text"]
            right += found == tidy_whitespace(straight, "lines")
    print(f"mojibake: {right} of {PLANTED['mojibake']} repaired to the letter")
    assert right >= LEAST * PLANTED["mojibake"]


def test_similar_pages_that_are_no_copies_are_listed_as_such(curated: Curated) -> None:
    """The similarity that is told is that of the sets of strings."""
    before = curated.after("clean")
    pairs = read_lines(curated.folder / "out.duplicates.pairs.jsonl")
    assert len(pairs) >= PLANTED["near"]
    for pair in pairs:
        one, other = (plain.shingles(before[pair[side]]["text"]) for side in ("first", "second"))
        assert pair["similarity"] == pytest.approx(plain.jaccard(one, other), abs=1e-12)
        assert pair["similarity"] > 0.5


def test_nothing_of_the_evaluation_set_is_left(curated: Curated) -> None:
    ngrams = plain.evaluation_ngrams(curated.crawl.passages)
    before = [record["text"] for record in curated.after("duplicates").values()]
    ngrams -= plain.frequent(before, ngrams, 10)
    lines = read_lines(curated.folder / "out.jsonl")
    assert [line["id"] for line in lines if plain.places(line["text"], ngrams)] == []
    planted = curated.planted("contaminated")
    there = {name for name in curated.after("duplicates") if name in planted}
    assert len(there) >= LEAST * len(planted)
    touched = there - {line["id"] for line in lines if "split_id" not in line}
    print(f"contaminated: {len(touched)} of {len(there)} cut or dropped")
    assert len(touched) >= LEAST * len(there)
    # What is not contaminated is not touched.
    clean = {
        record["id"]: record["text"]
        for record in curated.after("duplicates").values()
        if not plain.places(record["text"], ngrams)
    }
    assert len(clean) > 400
    assert clean == {line["id"]: line["text"] for line in lines if line["id"] in clean}


def test_the_counts_add_up(curated: Curated) -> None:
    steps = curated.metrics["steps"]
    assert list(steps) == ["urls", "clean", "duplicates", "decontaminate"]
    left = len(curated.crawl.records)
    for name, metrics in steps.items():
        assert metrics["records"] == metrics["pages"] == left
        dropped = read_lines(curated.folder / f"out.{name}.dropped.jsonl")
        assert metrics["dropped_by_reason"] == Counter(line["reason"] for line in dropped)
        assert metrics["pages_kept"] + len(dropped) == left
        left = metrics["records_written"]
    assert left == len(read_lines(curated.folder / "out.jsonl"))
    assert json.dumps(curated.metrics)
