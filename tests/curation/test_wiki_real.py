"""Real articles: the slice of the English Wikipedia in gensim's own test data."""

from __future__ import annotations

import bz2
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import iterparse

import pytest

from mtk.cli.main import main

SLICE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
LEFT = re.compile(
    r"\{\{|\}\}|\[\[|\]\]|\{\||'''|</?(?:ref|span|div|table|br|sub|sup)\b|&[a-z]+;|__"
)
END = re.compile(
    "references|external links|see also|further reading|notes|footnotes|bibliography|sources"
    "|citations|notes and references"
)


def gensim_slice() -> Path:
    found = importlib.util.find_spec("gensim")
    path = Path(str(found and found.origin)).parent / "test" / "test_data" / SLICE
    if not path.is_file():
        pytest.skip("gensim, whose test data holds the slice, is not installed")
    return path


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("real") / "w.jsonl"
    command = ["curate", "wikipedia", "--input", str(gensim_slice()), "--output", str(out)]
    assert main(command) == 0
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 98
    listed = out.with_name("w.dropped.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = Counter(json.loads(line)["reason"] for line in listed)
    assert reasons == {"redirect": 99, "disambiguation": 8, "namespace": 1}
    return {record["title"]: record["text"] for record in records}


def test_hardly_any_markup_is_left(articles: dict[str, str]) -> None:
    left = {title: found for title, text in articles.items() if (found := LEFT.findall(text))}
    assert left == {}


@pytest.mark.parametrize(
    ("title", "sentence"),
    [
        ("Anarchism", "from the Greek ἀναρχία, i.e. anarchy (from ἄναρχος, anarchos, meaning"),
        ("Albedo", "Albedo or reflection coefficient, derived from Latin albedo"),
        ("Albedo", "with a range +0.1 to +0.4 W m⁻². Black carbon"),
        ("Aruba", "located about 1,600 km west of the main part of the Lesser Antilles and 29 km"),
        ("Alkane", "linear (general formula CnH2n+2) wherein"),
        ("Aardwolf", "territory of 1–4 km².\n\nBehavior\n\nAardwolves are shy and nocturnal"),
    ],
)
def test_sentences(articles: dict[str, str], title: str, sentence: str) -> None:
    assert sentence in articles[title]


def words(text: str) -> Counter[str]:
    """As gensim counts them: letters only, 2 to 15 of them."""
    return Counter(w.lower() for w in re.findall(r"[^\W\d_]+", text) if 2 <= len(w) <= 15)


def prose(wikitext: str) -> str:
    """Without sections at the end, references, tables and pictures, cut line by line."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(r"<ref[^<>]*/>|<ref[^<>]*>.*?</ref>", "", text, flags=re.DOTALL)
    kept, dropped, depth = [], 0, 0
    for line in text.split("\n"):
        heading = re.fullmatch(r"(=+)\s*(.*?)\s*=+\s*", line)
        if heading and not (dropped and len(heading[1]) > dropped):
            dropped = len(heading[1]) if END.fullmatch(heading[2].lower()) else 0
        depth += line.lstrip(" :*").startswith("{|")
        picture = re.match(r"\s*\[\[(File|Image|Category):", line, re.IGNORECASE)
        if not dropped and not depth and not picture:
            kept.append(line)
        depth -= bool(depth) and line.lstrip().startswith("|}")
    return "\n".join(kept)


def raw_pages(path: Path) -> Iterator[tuple[str, str]]:
    with bz2.open(path) as stream:
        for _, element in iterparse(stream):
            if element.tag.endswith("}page"):
                yield element.findtext("{*}title", ""), element.findtext(".//{*}text", "")
                element.clear()


FILTER = (
    "import json, sys, warnings; warnings.simplefilter('ignore')\n"
    "from gensim.corpora.wikicorpus import filter_wiki\n"
    "print(json.dumps({t: filter_wiki(x) for t, x in json.load(sys.stdin).items()}))"
)


@pytest.mark.slow
def test_words_that_gensim_finds_are_found(articles: dict[str, str]) -> None:
    """Of its words in prose nearly all; the rest are captions and galleries, by inspection."""
    raw = {title: prose(text) for title, text in raw_pages(gensim_slice()) if title in articles}
    done = subprocess.run(
        [sys.executable, "-c", FILTER],
        input=json.dumps(raw),
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = {title: words(text) for title, text in json.loads(done.stdout).items()}
    common = sum((theirs[t] & words(articles[t])).total() for t in theirs)
    total = sum(counted.total() for counted in theirs.values())
    recall = common / total
    print(f"{recall:.4f} of {total:,} words")
    assert total > 400_000 and recall > 0.996
