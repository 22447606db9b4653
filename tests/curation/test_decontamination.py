"""N-grams of evaluation sets against the simplest search and the simplest cut."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtk.config import make
from mtk.config.curate_web import CurateDecontaminateConfig
from mtk.curation.contamination import CutRules, cut
from mtk.curation.ngrams import NgramTable
from mtk.errors import ConfigError, DataError
from stages.curate_web import run_decontaminate
from tests.curation import plain
from tests.curation.crawl import make_crawl
from tests.curation.inputs import QUIET, read_lines, write_lines

WORDS = [
    "the",
    "of",
    "Rome",
    "sea",
    "a",
    "ship",
    "was",
    "İstanbul",
    "ΟΔΟΣ",
    "naïve",
    "x1",
    "and",
    "old",
]
SENTENCE = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen."


def prose(chance: random.Random, words: int) -> str:
    """Words of a small vocabulary, so that n-grams repeat, with signs between them."""
    found = []
    for _ in range(words):
        found.append(chance.choice(WORDS))
        found.append(chance.choice((" ", " ", " ", ", ", ". ", "! ", "-", "'", "\n")))
    return "".join(found)


def config(folder: Path, output: str = "out.jsonl", **more: Any) -> CurateDecontaminateConfig:
    values = {"input": [str(folder / "in.jsonl")], "output": str(folder / output), "workers": 1}
    return make(CurateDecontaminateConfig, **(values | more))


@pytest.mark.parametrize("seed", range(8))
def test_matches_are_those_of_the_plain_search(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    texts = [prose(chance, chance.randrange(3, 12)) for _ in range(30)]
    table = NgramTable.build(texts, 3, 5)
    table.save(tmp_path)
    ngrams = plain.evaluation_ngrams(texts, 3, 5)
    assert len(table) == len(ngrams)
    for used in (table, NgramTable.load(tmp_path)):
        names: dict[int, str] = {}
        for _ in range(10):
            text = prose(chance, 60) + chance.choice(texts) + prose(chance, 60)
            expected = plain.places(text, ngrams)
            found = used.find(text)
            assert found and [(hit.start, hit.end) for hit in found] == [e[:2] for e in expected]
            for hit, (_, _, ngram) in zip(found, expected, strict=True):
                assert names.setdefault(hit.ngram, ngram) == ngram
        assert len(set(names.values())) == len(names)


def test_hashes_that_agree_do_not_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids decide: with a hash that says nothing the matches are the same."""
    import mtk.curation.ngrams as module

    chance = random.Random(1)
    texts = [prose(chance, 9) for _ in range(20)]
    text = prose(chance, 200) + texts[3]
    expected = NgramTable.build(texts, 3, 4).find(text)
    monkeypatch.setattr(module, "_hashes", lambda grams: np.zeros(len(grams), np.uint64))
    rolled = module._rolled
    monkeypatch.setattr(
        module, "_rolled", lambda ids, n: ((m, h * np.uint64(0)) for m, h in rolled(ids, n))
    )
    found = NgramTable.build(texts, 3, 4).find(text)
    assert [(hit.start, hit.end) for hit in found] == [(hit.start, hit.end) for hit in expected]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("margin", [0, 7, 40])
def test_cuts_are_those_of_the_plain_way(seed: int, margin: int) -> None:
    chance = random.Random(seed)
    texts = [prose(chance, 6) for _ in range(4)]
    table = NgramTable.build(texts, 3, 5)
    ngrams = plain.evaluation_ngrams(texts, 3, 5)
    for _ in range(30):
        text = prose(chance, 120)
        for passage in texts:
            text = text.replace(". ", f". {passage} ", 1) + prose(chance, 80)
        least = chance.choice((0, 20, 60))
        found = cut(text, table.find(text), CutRules(margin, least, 10))
        assert found == plain.cut(text, ngrams, margin, least)


def run(folder: Path, texts: list[str], evaluation: list[str], **more: Any) -> dict[str, Any]:
    write_lines(folder / "in.jsonl", [{"text": t, "url": f"u{i}"} for i, t in enumerate(texts)])
    write_lines(folder / "eval.jsonl", [{"text": text} for text in evaluation])
    made = config(folder, evaluation_jsonl=[str(folder / "eval.jsonl")], list_dropped=True, **more)
    return dict(run_decontaminate(made, QUIET).metrics)


def filler(chance: random.Random, sentences: int) -> str:
    return " ".join(
        " ".join(f"w{chance.randrange(10**6)}" for _ in range(9)) + "." for _ in range(sentences)
    )


def test_a_cut_and_what_is_left(tmp_path: Path) -> None:
    chance = random.Random(2)
    left, right = filler(chance, 12), filler(chance, 12)
    contaminated = f"{left} {SENTENCE} {right}"
    clean = filler(chance, 5)
    metrics = run(tmp_path, [contaminated, clean, f"short. {SENTENCE} end."], [SENTENCE])
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["url"] for line in lines] == ["u0", "u0", "u1"]
    first, second, untouched = lines
    assert untouched == {"text": clean, "url": "u1"}
    assert first["split_id"] == "0000000001-0000" and second["split_id"] == "0000000001-0001"
    assert left.startswith(first["text"]) and first["text"].endswith(".")
    assert right.endswith(second["text"])
    # 200 characters and the rest of a sentence are gone on both sides, and not a sentence more.
    for whole, piece in ((left, first["text"]), (right, second["text"])):
        assert 200 <= len(whole) - len(piece) + 1 < 200 + 90
    assert metrics["changes"] == {"cut": 1}
    assert metrics["dropped_by_reason"] == {"nothing left": 1}
    assert metrics["evaluation_ngrams"] == metrics["ngrams_found"] == 2
    [dropped] = read_lines(tmp_path / "out.dropped.jsonl")
    assert dropped["id"] == "u2" and dropped["detail"] == "2 matches, the first at character 7"


def test_what_the_corpus_holds_often_cuts_nothing(tmp_path: Path) -> None:
    chance = random.Random(3)
    texts = [f"{filler(chance, 9)} {SENTENCE} {filler(chance, 9)}" for _ in range(10)]
    assert run(tmp_path, texts, [SENTENCE])["ngrams_too_frequent"] == 2
    assert [line["text"] for line in read_lines(tmp_path / "out.jsonl")] == texts
    (tmp_path / "b").mkdir()
    assert run(tmp_path / "b", texts[:9], [SENTENCE])["changes"] == {"cut": 9}
    (tmp_path / "c").mkdir()
    assert run(tmp_path / "c", texts, [SENTENCE], frequent=11)["changes"] == {"cut": 10}


def test_too_many_pieces(tmp_path: Path) -> None:
    chance = random.Random(4)

    def text(matches: int) -> str:
        return f" {SENTENCE} ".join(filler(chance, 14) for _ in range(matches + 1))

    metrics = run(tmp_path, [text(9), text(10), filler(chance, 3)], [SENTENCE], frequent=1000)
    assert metrics["dropped_by_reason"] == {"too many pieces": 1}
    assert len(read_lines(tmp_path / "out.jsonl")) == 10 + 1


@pytest.mark.parametrize(("words", "counts"), [(7, False), (8, True), (12, True), (13, True)])
def test_short_texts_count_whole(tmp_path: Path, words: int, counts: bool) -> None:
    chance = random.Random(5)
    passage = " ".join(SENTENCE.split()[:words])
    others = filler(chance, 4)  # so that there is something to look for at all
    text = f"{filler(chance, 12)} {passage} {filler(chance, 12)}"
    metrics = run(tmp_path, [text, filler(chance, 5)], [passage.upper(), others])
    assert metrics["changes"] == ({"cut": 1} if counts else {})


def test_part_of_a_short_text_is_no_match(tmp_path: Path) -> None:
    chance = random.Random(6)
    passage = " ".join(SENTENCE.split()[:10])
    text = f"{filler(chance, 12)} {' '.join(SENTENCE.split()[:9])}, other {filler(chance, 12)}"
    assert run(tmp_path, [text], [passage])["changes"] == {}


def test_formats(tmp_path: Path) -> None:
    chance = random.Random(7)
    passages = [filler(chance, 2) for _ in range(6)]
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": passages[0]}) + "\n")
    race = tmp_path / "RACE" / "test" / "high"
    race.mkdir(parents=True)
    record = {"article": passages[1], "questions": [passages[2]], "options": [], "answers": []}
    (race / "1.txt").write_text(json.dumps(record) + "\n")
    words = passages[3].replace(".", " .").split()
    (tmp_path / "wiki.test.tokens").write_text(f" \n = Title = \n \n {' '.join(words)} \n \n")
    other = [{"question": passages[4], "id": 1}, {"text": "short"}, {"more": [passages[5]]}]
    write_lines(tmp_path / "qa.jsonl", other)
    texts = [f"{filler(chance, 9)} {passage} {filler(chance, 9)}" for passage in passages]
    write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    made = config(
        tmp_path,
        evaluation_lambada=[str(tmp_path / "lambada.jsonl")],
        evaluation_race=[str(tmp_path / "RACE")],
        evaluation_text=[str(tmp_path / "wiki.*.tokens")],
        evaluation_jsonl=[str(tmp_path / "qa.jsonl")],
        evaluation_keys=["text", "question", "more"],
    )
    artifact = run_decontaminate(made, QUIET)
    assert artifact.metrics["changes"] == {"cut": 6}
    assert len([item for item in artifact.inputs if "evaluation" in item.role]) == 4


@pytest.mark.parametrize(
    ("content", "keys", "words"),
    [
        ('{"text": "too short"}\n', ["text"], "has 8 words"),
        ('{"title": "x"}\n', ["text"], "has none of the fields text; it has title"),
        ("{\n", ["text"], "eval.jsonl:1 is not JSON"),
        ('{"text": 5}\n', ["text"], "neither a text nor a list"),
        ("[1]\n", ["text"], "not an object"),
    ],
)
def test_mistakes_in_evaluation_sets(
    tmp_path: Path, content: str, keys: list[str], words: str
) -> None:
    write_lines(tmp_path / "in.jsonl", [{"text": SENTENCE}])
    (tmp_path / "eval.jsonl").write_text(content)
    made = config(tmp_path, evaluation_jsonl=[str(tmp_path / "eval.jsonl")], evaluation_keys=keys)
    with pytest.raises(DataError, match=words.replace("[", "\\[")):
        run_decontaminate(made, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.jsonl", "in.jsonl"]


def test_evaluation_sets_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no evaluation set"):
        config(tmp_path)


def test_the_crawl_against_the_plain_way(tmp_path: Path) -> None:
    """All contaminated pages of the crawl, letter for letter."""
    crawl = make_crawl()
    pages = [r["text"] for r in crawl.records if r["case"] in ("contaminated", "similar")]
    metrics = run(tmp_path, pages, list(crawl.passages))
    ngrams = plain.evaluation_ngrams(crawl.passages)
    ngrams -= plain.frequent(pages, ngrams, 10)
    expected = []
    for page in pages:
        pieces = plain.cut(page, ngrams, 200, 200) if plain.places(page, ngrams) else [page]
        expected += pieces if len(pieces) <= 10 else []
    assert [line["text"] for line in read_lines(tmp_path / "out.jsonl")] == expected
    assert metrics["changes"]["cut"] >= 50
