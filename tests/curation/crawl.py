"""A crawl of more than a thousand pages of real text, with planted faults.

Every record says what was planted: ``case``, ``id``, and ``of``, the page it was made from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mtk.data.cloze import cloze_passages
from mtk.data.demo_corpus import demo_documents
from tests.curation.foreign import SENTENCES
from tests.curation.plain import shingles

GOOD = 480
PLANTED = {
    "exact": 100,
    "near": 120,
    "similar": 40,
    "javascript": 60,
    "mojibake": 60,
    "foreign": 60,
    "short": 60,
    "contaminated": 60,
    "domain": 30,
    "extension": 30,
    "short url": 10,
    "malformed": 30,
    "same url": 30,
}
NOTICES = (
    "Please enable JavaScript in your browser to view this page.",
    "This site needs JavaScript and cookies. Turn both on and load the page again, please.",
    "You are seeing this because JavaScript is disabled. Most of this shop will not work.",
)
BAD_DOMAINS = ("www.facebook.com", "i.imgur.com", "old.reddit.com", "amazon.co.uk", "youtu.be")
BAD_ENDS = (".pdf", ".zip", ".JPG", ".7z", ".ai", ".tar.gz", ".mp3?download=1")
BAD_URLS = (
    "htp://site{}.org/page",
    "ftp://files{}.org/readme",
    "http://localhost{}/index",
    "http://site{}.org:99999/a",
    "http://-site{}.org/a",
    "http://site{}.org/a page",
    "http://300.1.2.{}/page",
)
ACCENTS = ("naïve café", "the “quoted” words", "a dash — like this", "Zürich’s déjà vu")


@dataclass(frozen=True)
class Crawl:
    records: tuple[dict[str, str], ...]
    passages: tuple[str, ...]  # of the evaluation set

    def write(self, folder: Path) -> tuple[Path, Path]:
        """(crawl.jsonl, evaluation.jsonl)"""
        crawl, evaluation = folder / "crawl.jsonl", folder / "evaluation.jsonl"
        crawl.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.records))
        evaluation.write_text("".join(json.dumps({"text": p}) + "\n" for p in self.passages))
        return crawl, evaluation


@lru_cache(maxsize=1)
def make_crawl(seed: int = 7) -> Crawl:
    """The same for the same Python."""
    chance = random.Random(seed)
    documents = demo_documents()
    passages = cloze_passages(d.text for d in documents if d.is_heldout)
    fresh = _base_pages([d.text for d in documents if not d.is_heldout])
    good = [_record(f"good-{i}", "good", next(fresh)) for i in range(GOOD)]
    planted = [
        record
        for case, number in PLANTED.items()
        for index in range(number)
        for record in _planted(case, index, good, fresh, passages, chance)
    ]
    # What a page is a copy of comes first, as the first of a group is kept.
    return Crawl(tuple(good + chance.sample(planted, len(planted))), tuple(passages))


def _record(name: str, case: str, text: str, of: str = "", url: str = "") -> dict[str, str]:
    url = url or f"http://{name.replace(' ', '-')}.example.org/page"
    return {"id": name, "case": case, "of": of, "url": url, "text": text}


def _base_pages(texts: list[str]) -> Iterator[str]:
    """Stretches of whole paragraphs with 900 to some thousand characters, 170 words or more."""
    for text in texts:
        page: list[str] = []
        for paragraph in text.split("\n\n"):
            page.append(paragraph)
            whole = "\n\n".join(page)
            if len(whole) >= 900 and len(whole.split()) >= 170:
                yield whole
                page = []


def _planted(
    case: str,
    index: int,
    good: list[dict[str, str]],
    fresh: Iterator[str],
    passages: list[str],
    chance: random.Random,
) -> Iterator[dict[str, str]]:
    name = f"{case}-{index}"
    source = good[(index * 3) % len(good)]
    if case == "exact":
        yield _record(name, case, source["text"], source["id"])
    elif case == "near":
        source = good[(index * 3 + 1) % len(good)]
        yield _record(name, case, nearly(source["text"], 0.94, 0.99, chance), source["id"])
    elif case == "similar":
        source = good[(index * 3 + 2) % len(good)]
        text = source["text"][: len(source["text"]) // 2] + next(fresh)[:900]
        yield _record(name, case, text, source["id"])
    elif case == "javascript":
        text = f"{NOTICES[index % len(NOTICES)]} {source['text'][:80]}"
        yield _record(name, case, text[: chance.randrange(90, 250)])
    elif case == "mojibake":
        words = next(fresh).split(" ")
        for accent in ACCENTS:
            words.insert(chance.randrange(len(words)), accent)
        right = " ".join(words)
        yield _record(name, case, garbled(right), right)
    elif case == "foreign":
        language = list(SENTENCES)[index % len(SENTENCES)]
        sentences = list(SENTENCES[language]) * 2
        chance.shuffle(sentences)
        yield _record(name, case, " ".join(sentences), language)
    elif case == "short":
        words = re.findall("[A-Za-z]+", source["text"])[: chance.randrange(60, 100)]
        yield _record(name, case, f"{' '.join(words)} and so on and on.")
    elif case == "contaminated":
        text, passage = next(fresh) + "\n\n" + next(fresh), passages[index % len(passages)]
        middle = text.find(" ", len(text) // 2)
        yield _record(name, case, f"{text[:middle]} {passage} {text[middle:]}", passage)
    else:
        yield _record(name, case, next(fresh), url=_bad_url(case, index, good))


def _bad_url(case: str, index: int, good: list[dict[str, str]]) -> str:
    if case == "domain":
        return f"https://{BAD_DOMAINS[index % len(BAD_DOMAINS)]}/some/{index}"
    if case == "extension":
        return f"http://files.example.org/paper{index}{BAD_ENDS[index % len(BAD_ENDS)]}"
    if case == "short url":
        return f"ab{index % 10}.de"
    if case == "malformed":
        return BAD_URLS[index % len(BAD_URLS)].format(index)
    return good[index]["url"]


def garbled(text: str) -> str:
    """UTF-8 that somebody took for Windows' Western encoding, as browsers read it: its five
    holes are control characters."""
    holes = "\x81\x8d\x8f\x90\x9d"
    return "".join(
        chr(byte) if chr(byte) in holes else bytes([byte]).decode("cp1252")
        for byte in text.encode()
    )


def nearly(text: str, least: float, most: float, chance: random.Random) -> str:
    """The text with single words replaced until its shingles agree only so far."""
    words = text.split(" ")
    whole = shingles(text)
    while True:
        words[chance.randrange(len(words))] = chance.choice(("indeed", "1999", "perhaps", "(sic)"))
        now = shingles(" ".join(words))
        alike = len(whole & now) / len(whole | now)
        if alike <= most:
            assert alike >= least, alike
            return " ".join(words)
