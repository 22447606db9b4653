"""The page about curation tells the truth where a program can tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtk.curation.cleaning import EMPTY, FEW_CHARS, FEW_TOKENS, JAVASCRIPT, LANGUAGE
from mtk.curation.contamination import NOTHING_LEFT, PIECES
from mtk.curation.keeping import EXACT, NEAR
from mtk.curation.shingles import MinHash
from mtk.curation.urls import DOMAIN, DUPLICATE, EXTENSION, MALFORMED, SHORT
from tests.curation.crawl import make_crawl
from tests.docs.shell_commands import ROOT, fenced

PAGE = ROOT / "docs" / "curation.md"
REASONS = {
    "urls": (DOMAIN, EXTENSION, SHORT, MALFORMED, DUPLICATE),
    "clean": (EMPTY, JAVASCRIPT, FEW_CHARS, FEW_TOKENS, LANGUAGE),
    "duplicates": (EXACT, NEAR),
    "decontaminate": (NOTHING_LEFT, PIECES),
}


def rows() -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_reasons_are_those_that_are_counted() -> None:
    names = [f"`{step}`" for step in REASONS]
    found = {row[0].strip("`"): row[-1] for row in rows() if row[0] in names}
    assert found == {step: ", ".join(reasons) for step, reasons in REASONS.items()}


@pytest.mark.parametrize(("bands", "number"), [(10, 10), (20, 5)])
def test_chances_are_those_of_the_formula(bands: int, number: int) -> None:
    [head] = [row for row in rows() if row[0] == "similarity"]
    [row] = [row for row in rows() if row[0].startswith(f"`--bands {bands} --rows {number}`")]
    minhash = MinHash(bands, number, 1)
    assert row[1:] == [f"{minhash.chance(float(s)):.2f}" for s in head[1:]]


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_crawl().write(tmp_path)
    [example] = [text for language, text in fenced(PAGE) if language == "python"]
    exec(compile(example, str(PAGE), "exec"), {})
    assert "'urls: blocked domain': 30" in capfd.readouterr().out
    assert (tmp_path / "corpus.jsonl").stat().st_size > 500_000
