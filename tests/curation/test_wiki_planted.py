"""Real prose with known markup strewn in: what every filter finds, and what it takes too much."""

from __future__ import annotations

import bz2
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mtk.cli.main import main
from tests.curation.wiki_dumps import Planted, dump, planted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planted, Path]:
    folder = tmp_path_factory.mktemp("planted")
    plan = planted()
    assert len(plan.pages) >= 1_000
    (folder / "d.xml.bz2").write_bytes(bz2.compress(dump(plan.pages)))
    command = ["curate", "wikipedia", "--input", str(folder / "d.xml.bz2"), "--lists", "drop"]
    command += ["--list-dropped", "100000", "--workers", "1"]
    assert main([*command, "--output", str(folder / "out.jsonl")]) == 0
    return plan, folder


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pages_are_dropped_for_the_right_reason(made: tuple[Planted, Path]) -> None:
    plan, folder = made
    found = {entry["title"]: entry["reason"] for entry in records(folder / "out.dropped.jsonl")}
    for reason in sorted(set(plan.reasons.values())):
        wanted = {title for title, why in plan.reasons.items() if why == reason}
        got = {title for title, why in found.items() if why == reason}
        recall, precision = len(wanted & got) / len(wanted), len(wanted & got) / len(got)
        print(f"{reason}: recall {recall:.4f}, precision {precision:.4f} of {len(wanted)}")
        assert recall >= 0.99 and precision >= 0.99, reason
    assert {record["title"] for record in records(folder / "out.jsonl")} == set(plan.words)


def test_markup_goes_and_text_stays(made: tuple[Planted, Path]) -> None:
    plan, folder = made
    texts = {record["title"]: record["text"] for record in records(folder / "out.jsonl")}
    seen = Counter(word for text in texts.values() for word in re.findall(r"\w+", text))
    for kind, words in plan.gone.items():
        left = sum(seen[word] > 0 for word in words)
        print(f"{kind}: {1 - left / len(words):.4f} of {len(words)} gone")
        assert len(words) >= 20 and left <= 0.01 * len(words), kind
    for kind, words in plan.kept.items():
        kept = sum(seen[word] == 1 for word in words)
        print(f"{kind}: {kept / len(words):.4f} of {len(words)} kept")
        assert len(words) >= 20 and kept >= 0.99 * len(words), kind
    wanted, got, common = 0, 0, 0
    for title, words in plan.words.items():
        expected, actual = Counter(words), Counter(re.findall(r"\w+", texts[title]))
        wanted, got = wanted + expected.total(), got + actual.total()
        common += (expected & actual).total()
    print(f"words: recall {common / wanted:.5f}, precision {common / got:.5f} of {wanted:,}")
    assert common / wanted >= 0.999 and common / got >= 0.999
