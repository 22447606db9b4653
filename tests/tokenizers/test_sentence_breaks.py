"""Sentences end exactly where NLTK ends them: real texts, and mixtures of all that it looks at."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from mtk.data.demo_corpus import demo_documents
from mtk.tokenizers import sentence_breaks
from mtk.tokenizers.punkt import PunktSplitter, learn_parameters, write_parameters
from mtk.tokenizers.sentence_breaks import SentenceBreaks

LINES = (
    "the The foo Foo Dr dr Smith smith U.S e.g etc Jan a.m J.R x X y Y A J 3 12 -4,5 1a a1",
    "foo.bar foo-etc etc-foo a.b x-y (the ).foo _a _ a_b foo/dr :x [etc (Dr x.etc İ ß é 日本 。",
    ". .. ... ? ! ?? !? , ; : -- - ( ) [ ] { } \" ' ” “ » « @ * # & ` ``",
)
UNUSUAL = ("\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\x0b", "\x0c")
WORDS = (*" ".join(LINES).split(" "), *UNUSUAL)
BLANKS = (" ", " ", "\n", "", "", "\n\n", "\t", "  ", " \n", "\r\n", "\x0b", "\xa0")
TEXTS = (
    *("", " ", ".", "?", " ?? x", "?? x", " . x", "a ?? b", "a . . . b", 'x [etc] . . .". With'),
    *(
        "Wrong ??\n    Then",
        '"Yes." "No." he',
        "(One.) Two.) -- Three",
        "a.)\nB",
        "Dr.\x1cSmith. \x1c",
    ),
    *("." * 3000, "a." * 3000, ". " * 3000, "x" * 5000 + ". Y", "Dr. " + "y" * 5000, "a\nb. C\n"),
)


@pytest.fixture(scope="module")
def splitter(tmp_path_factory: pytest.TempPathFactory) -> PunktSplitter:
    path = tmp_path_factory.mktemp("punkt") / "punkt.json"
    found = learn_parameters(
        (text for _, text in zip(range(150), texts(), strict=False)), "english"
    )
    found["collocations"] += [["dr", "smith"], ["##number##", "foo"], ["x", "y"], ["foo", "the"]]
    found["collocations"] += [[".", "y"], ["a.b", "x"]]
    found["sent_starters"] += ["the", "a", "x"]
    write_parameters(found, path)
    return PunktSplitter(str(path), False)


@cache
def texts() -> list[str]:
    return [document.text for document in itertools.islice(demo_documents(), 130)]


def assert_same(splitter: PunktSplitter, breaks: SentenceBreaks, text: str) -> None:
    assert breaks.spans(text) == list(splitter.plain.span_tokenize(text)), repr(text[:300])


def mixture(rng: random.Random) -> str:
    def word() -> str:
        mark = rng.choice(".....?!") if rng.random() < 0.4 else ""
        return rng.choice(WORDS) + mark + rng.choice(BLANKS)

    return "".join(word() for _ in range(rng.randrange(1, rng.choice((4, 9, 40)))))


def test_odd_texts(splitter: PunktSplitter) -> None:
    for text in TEXTS:
        assert_same(splitter, SentenceBreaks(splitter.plain), text)


def test_mixtures(splitter: PunktSplitter) -> None:
    breaks = SentenceBreaks(splitter.plain)
    rng = random.Random(0)
    for _ in range(6000):
        assert_same(splitter, breaks, mixture(rng))
    assert len(breaks._left) > 1000
    assert len(breaks._pairs) > 500


def test_documentation(splitter: PunktSplitter) -> None:
    breaks = SentenceBreaks(splitter.plain)
    for text in texts()[-50:]:
        assert_same(splitter, breaks, text)


def test_forgetting(splitter: PunktSplitter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_breaks, "REMEMBERED", 7)
    monkeypatch.setattr(sentence_breaks, "LONGEST", 9)
    breaks = SentenceBreaks(splitter.plain)
    rng = random.Random(1)
    for _ in range(300):
        assert_same(splitter, breaks, mixture(rng))
        tables = (breaks._left, breaks._right, breaks._whole, breaks._pairs)
        assert all(len(table) <= 7 for table in tables)


def test_nothing_that_is_remembered_changes(splitter: PunktSplitter) -> None:
    """Decisions do not depend on what was decided before."""
    breaks = SentenceBreaks(splitter.plain)
    rng = random.Random(2)
    found = [mixture(rng) for _ in range(300)]
    first = [breaks.spans(text) for text in found]
    assert [breaks.spans(text) for text in reversed(found)] == first[::-1]
