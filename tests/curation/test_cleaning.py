"""Repairing texts and judging them."""

from __future__ import annotations

import json
from typing import Any

import ftfy
import pytest

from mtk.curation.cleaning import CleanPlan, clean_judge
from mtk.curation.languages import LOOKED_AT, language_finder
from mtk.curation.pages import Page
from mtk.curation.repair import repairer, tidy_whitespace
from tests.curation.crawl import garbled, make_crawl
from tests.curation.foreign import SENTENCES

ENGLISH = "This is a perfectly ordinary sentence about the weather, of which there is a lot. " * 20
STRANGE = (
    "",
    "plain",
    "a\r\nb\rc\n",
    "caf\u00c3\u00a9 \u00e2\u20ac\u0153x\u00e2\u20ac\x9d",
    "&lt;p&gt; &amp; &eacute;",
    "&amp; before\n<b>markup</b>\n&amp; behind\n\u00c3\u00a9",
    "\u201cquoted\u201d\u2026 \ufb01ne \uff21\uff22",
    "e\u0301 combined",
    "\x1b[31mred\x1b[0m\x00\x07",
    "a\u2028b\u2029c\x85d",
    "line\n\u00c3\u00a9\r\n\u00c3\u00a9",
    "\ufeffmark",
    "\u00c3\u00a9" * 50 + "\n" * 5,
)


def plan(**values: Any) -> CleanPlan:
    defaults: dict[str, Any] = {
        "key": "text",
        "id_key": "url",
        "repair": True,
        "whitespace": "lines",
        "languages": ("en",),
        "min_tokens": 128,
        "min_chars": 0,
        "javascript_chars": 256,
    }
    return CleanPlan(**(defaults | values))


def judged(text: str, **values: Any) -> tuple[str, str]:
    """(text that is kept, reason why not)"""
    record = {"text": text, "other": 1}
    page = Page(json.dumps(record).encode(), False, "text", text)
    verdict = clean_judge(plan(**values))(page, 1)
    if not verdict.lines:
        return "", verdict.reason
    found = json.loads(verdict.lines[0])
    assert found["other"] == 1
    return found["text"], ""


def test_repair_is_ftfys() -> None:
    repair = repairer()
    texts = [*STRANGE, *(record["text"] for record in make_crawl().records[::4])]
    texts += [garbled(text + " ü\n& “x”") for text in texts[-60:]]
    for text in texts:
        assert repair(text) == ftfy.fix_text(text)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("keep", " a  b\t c \r\n\r\n \n\n\n d\u00a0\u00a0e \n"),
        ("spaces", "a b c d e"),
        ("lines", "a b c\n\nd e"),
    ],
)
def test_white_space(how: Any, expected: str) -> None:
    assert tidy_whitespace(" a  b\t c \r\n\r\n \n\n\n d\u00a0\u00a0e \n", how) == expected


def test_all_repairs_are_made_to_one_page() -> None:
    """Mojibake, white space and carriage returns together, where a tool stops at the first."""
    text = f"caf\u00c3\u00a9   is\r\n\n\n\nopen  {ENGLISH}"
    found, reason = judged(text)
    assert not reason and found.startswith("café is\n\nopen This is")
    kept, _ = judged(text, repair=False, whitespace="keep")
    assert kept == text


@pytest.mark.parametrize(
    ("text", "values", "reason"),
    [
        ("", {}, "empty"),
        (" \n ", {"min_tokens": 0}, "empty"),
        ("Please turn on JavaScript.", {}, "javascript notice"),
        ("Please turn on JavaScript.", {"javascript_chars": 0, "min_tokens": 0}, ""),
        ("JAVASCRIPT " + "x" * 244, {"min_tokens": 0, "languages": ()}, "javascript notice"),
        ("JAVASCRIPT " + "x" * 245, {"min_tokens": 0, "languages": ()}, ""),
        ("word " * 127, {"languages": ()}, "too few tokens"),
        ("word " * 128, {"languages": ()}, ""),
        ("word, " * 64, {"languages": ()}, ""),
        ("w" * 1023, {"languages": ()}, "too few tokens"),
        ("w" * 1024, {"languages": ()}, ""),
        ("w" * 511, {"languages": (), "min_tokens": 0, "min_chars": 512}, "too few characters"),
        ("w" * 512, {"languages": (), "min_tokens": 0, "min_chars": 512}, ""),
        (ENGLISH, {}, ""),
        (" ".join(SENTENCES["de"] * 2), {}, "other language"),
        (" ".join(SENTENCES["de"] * 2), {"languages": ("en", "de")}, ""),
        ("1234 5678 " * 100, {}, "other language"),
    ],
)
def test_rules(text: str, values: dict[str, Any], reason: str) -> None:
    assert judged(text, **values)[1] == reason


def test_tokens_of_a_tokenizer(tmp_path: Any) -> None:
    from tests.tokenizers.samples import trained

    tokenizer = trained("bpe")
    tokenizer.save(tmp_path / "tok")
    text = "unusual " * 20
    count = len(tokenizer.encode(text.strip()))
    assert count > 20
    values = {"languages": (), "tokenizer": str(tmp_path / "tok")}
    assert judged(text, min_tokens=count, **values)[1] == ""
    assert judged(text, min_tokens=count + 1, **values)[1] == "too few tokens"


def test_languages() -> None:
    find = language_finder()
    for code, sentences in SENTENCES.items():
        assert find(" ".join(sentences)) == code
        assert find(" ".join(sentences) * 40) == code
    assert find("12 34 -- 5") == "und"
    # Only stretches of a long text are looked at, its end among them.
    german = " ".join(SENTENCES["de"])
    assert find("1 " * 5000 + german[: LOOKED_AT // 2]) == "de"
