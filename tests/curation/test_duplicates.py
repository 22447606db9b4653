"""Near-duplicates against sets of strings, all pairs and the simplest grouping."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtk.config import make
from mtk.config.curate_web import CurateDuplicatesConfig
from mtk.curation.groups import Groups
from mtk.curation.shingles import MinHash, shingle_hashes, similarity
from stages.curate_web import run_duplicates
from tests.curation import plain
from tests.curation.crawl import make_crawl, nearly
from tests.curation.inputs import QUIET, read_lines, write_lines

TEXTS = [record["text"] for record in make_crawl().records[:200]]


def config(folder: Path, output: str = "out.jsonl", **more: Any) -> CurateDuplicatesConfig:
    values = {"input": [str(folder / "in.jsonl")], "output": str(folder / output), "workers": 1}
    return make(CurateDuplicatesConfig, **(values | more))


@pytest.mark.parametrize(
    "text", ["", "a", "abcd", "abcde", "abcdef", "aaaaaaaa", "é\U0001f600" * 9]
)
def test_a_shingle_is_a_run_of_characters(text: str) -> None:
    hashes = shingle_hashes(text, 5, "chars")
    assert len(hashes) == max(0, len(text) - 4)  # the last one counts
    assert len(np.unique(hashes)) == len(plain.shingles(text))
    again = {text[i : i + 5]: h for i, h in enumerate(hashes.tolist())}
    assert all(again[text[i : i + 5]] == h for i, h in enumerate(hashes.tolist()))


def test_word_shingles() -> None:
    hashes = shingle_hashes("One two, THREE one-two three", 2, "words")
    assert len(hashes) == 5 and len(np.unique(hashes)) == 3
    assert len(shingle_hashes("One", 2, "words")) == 0


def test_similarity_is_that_of_sets() -> None:
    for first, second in combinations(TEXTS[:30], 2):
        second = first[: len(first) // 2] + second[:300]
        sets = plain.shingles(first), plain.shingles(second)
        one, other = (np.unique(shingle_hashes(text, 5, "chars")) for text in (first, second))
        shared = len(sets[0] & sets[1])
        assert similarity(one, other) == plain.jaccard(*sets)
        assert similarity(one, other, "min") == shared / min(map(len, sets))
        assert similarity(one, other, "max") == shared / max(map(len, sets))
    assert similarity(one, one[:0]) == 0.0


def test_signatures_are_minima_of_permutations() -> None:
    minhash = MinHash(3, 2, 1234)
    hashes = [shingle_hashes(text, 5, "chars") for text in ("", *TEXTS[:20])]
    found = minhash.signatures(hashes)
    assert found.shape == (21, 6)
    multipliers = minhash.multipliers().tolist()
    assert all(m % 2 for m in multipliers) and len(set(multipliers)) == 6
    for row, shingles in zip(found[1:].tolist(), hashes[1:], strict=True):
        expected = [min(h * m % 2**64 for h in shingles.tolist()) >> 32 for m in multipliers]
        assert row == expected
    assert found[0].tolist() == [0xFFFFFFFF] * 6
    # However documents are put together in blocks:
    alone = np.concatenate([minhash.signatures([h]) for h in hashes])
    assert np.array_equal(found, alone)


def test_signatures_stay_the_same() -> None:
    """Golden: of a fixed text, so that no release changes what is a duplicate unnoticed."""
    found = MinHash(2, 2, 1234).signatures([shingle_hashes("The quick brown fox", 5, "chars")])
    assert found.tolist() == [GOLDEN]


GOLDEN = [378314621, 189242599, 747383430, 271477642]


def test_minima_agree_as_often_as_sets() -> None:
    """Unbiased, and no wider than independent draws of a hundred minima are."""
    chance = random.Random(5)
    minhash = MinHash(10, 10, 1234)
    errors, expected = [], []
    for text in TEXTS:
        words = text.split(" ")
        share = chance.choice((0.02, 0.05, 0.1, 0.3))
        other = " ".join("zq7" if chance.random() < share else word for word in words)
        true = plain.jaccard(plain.shingles(text), plain.shingles(other))
        one, two = minhash.signatures([shingle_hashes(t, 5, "chars") for t in (text, other)])
        errors.append(float((one == two).mean()) - true)
        expected.append(true * (1 - true) / 100)
    spread = float(np.sqrt(np.mean(expected)))
    assert abs(np.mean(errors)) < 4 * spread / np.sqrt(len(errors))
    assert 0.8 < np.std(errors) / spread < 1.2


def test_pairs_meet_as_often_as_the_formula_says() -> None:
    chance = random.Random(6)
    minhash = MinHash(10, 10, 99)
    met, expected = 0, 0.0
    for text in TEXTS * 2:
        other = nearly(text, 0.6, 0.86, chance)
        bands = minhash.band_hashes(
            minhash.signatures([shingle_hashes(t, 5, "chars") for t in (text, other)])
        )
        met += bool((bands[0] == bands[1]).any())
        expected += minhash.chance(plain.jaccard(plain.shingles(text), plain.shingles(other)))
    assert abs(met - expected) < 4 * np.sqrt(len(TEXTS) * 2 * 0.25)
    assert minhash.chance(0.94) > 0.995


def corpus(chance: random.Random, number: int = 120) -> list[dict[str, str]]:
    """Families of texts of every degree of likeness, copies, and some too short for a shingle."""
    texts: list[str] = []
    while len(texts) < number:
        kind = chance.random()
        if not texts or kind < 0.35:
            texts.append(chance.choice(TEXTS)[: chance.randrange(60, 400)])
        elif kind < 0.45:
            texts.append(chance.choice(texts))
        elif kind < 0.5:
            texts.append(chance.choice(("", "ab", "abc", "abcd")))
        else:
            words = chance.choice(texts).split(" ")
            for _ in range(chance.randrange(1, 12)):
                words[chance.randrange(len(words))] = str(chance.randrange(99))
            texts.append(" ".join(words))
    return [{"text": text, "url": f"u{i}"} for i, text in enumerate(texts)]


@pytest.mark.parametrize("seed", range(4))
def test_against_all_pairs(tmp_path: Path, seed: int) -> None:
    """With so many bands of one row nearly every pair meets: groups are those of all pairs."""
    records = corpus(random.Random(seed))
    write_lines(tmp_path / "in.jsonl", records)
    artifact = run_duplicates(
        config(tmp_path, bands=120, rows=1, bucket_pivots=0, list_dropped=True, list_pairs=True),
        QUIET,
    )
    texts = [record["text"] for record in records]
    sets = [plain.shingles(text) for text in texts]
    alike = [
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if texts[i] == texts[j] or plain.jaccard(sets[i], sets[j]) >= 0.7
    ]
    firsts = plain.firsts(len(texts), alike)
    kept = [record for i, record in enumerate(records) if firsts[i] == i]
    assert 20 < len(kept) < 100
    assert read_lines(tmp_path / "out.jsonl") == kept
    dropped = {line["id"]: line for line in read_lines(tmp_path / "out.dropped.jsonl")}
    assert len(dropped) == len(records) - len(kept)
    for i, first in enumerate(firsts):
        if i != first:
            line = dropped[f"u{i}"]
            same = texts[i] == texts[first]
            assert line["reason"] == ("exact duplicate" if same else "near-duplicate")
            assert line["detail"] == f"of u{first}" and line["number"] == i + 1
    assert artifact.metrics["groups"] == len({f for i, f in enumerate(firsts) if i != f})
    for pair in read_lines(tmp_path / "out.pairs.jsonl"):
        i, j = int(pair["first"][1:]), int(pair["second"][1:])
        assert i < j and pair["similarity"] == plain.jaccard(sets[i], sets[j]) > 0.5


def test_other_measures_and_words(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(100))
    part = " ".join(f"word{i}" for i in range(60))
    write_lines(tmp_path / "in.jsonl", [{"text": long}, {"text": part}, {"text": long.upper()}])

    def kept(name: str, **more: Any) -> int:
        values = {"shingle": "words", "shingle_size": 3, "bands": 100, "rows": 1}
        run_duplicates(config(tmp_path, name, **(values | more)), QUIET)
        return len(read_lines(tmp_path / name))

    assert kept("1.jsonl") == 2  # words are compared in lower case
    assert kept("2.jsonl", jaccard="min") == 1
    assert kept("3.jsonl", jaccard="max") == 2
    assert kept("4.jsonl", group_similarity=0.55) == 1
    assert kept("5.jsonl", shingle="chars", shingle_size=5) == 3


def test_a_bucket_of_strangers_does_not_cost_all_pairs(tmp_path: Path) -> None:
    """Texts that share a band but little else: as many rounds as --bucket-pivots allows."""
    common = " ".join(f"common{i}" for i in range(200))
    texts = [f"{common} " + " ".join(f"own{i}x{j}" for j in range(100)) for i in range(100)]
    write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    values = {
        "bands": 1,
        "rows": 1,
        "shingle": "words",
        "shingle_size": 1,
        "group_similarity": 0.95,
    }
    free = run_duplicates(config(tmp_path, "a.jsonl", bucket_pivots=0, **values), QUIET).metrics
    bound = run_duplicates(config(tmp_path, "b.jsonl", bucket_pivots=2, **values), QUIET).metrics
    assert free["buckets_cut_short"] == 0 < bound["buckets_cut_short"]
    assert bound["compared"] <= 2 * 100 < free["compared"]


def test_copies_cost_one_comparison_each(tmp_path: Path) -> None:
    words = TEXTS[0].split(" ")
    texts = [" ".join([*words[:-1], f"end{i}"]) for i in range(300)]
    write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    metrics = run_duplicates(config(tmp_path), QUIET).metrics
    assert metrics["pages_kept"] == 1 and metrics["compared"] < 3 * 300


def test_groups() -> None:
    chance = random.Random(1)
    pairs = [(chance.randrange(500), chance.randrange(500)) for _ in range(300)]
    groups = Groups(500)
    for one, other in pairs:
        groups.join(one, other)
    expected = plain.firsts(500, pairs)
    assert [groups.first(i) for i in range(500)] == expected
    assert groups.all_firsts().tolist() == expected
