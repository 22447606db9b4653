"""The demo corpus: size, origin, order, what is held out, cloze passages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtk.artifacts import open_artifact, verify_lineage
from mtk.artifacts.manifest import input_file
from mtk.cli.main import main
from mtk.data.cloze import cloze_passages
from mtk.data.demo_corpus import demo_documents, library_documents


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    assert main(["corpus", "demo", "--output", str(folder / "d.jsonl"), "--cloze"]) == 0
    return folder


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_written(written: Path) -> None:
    kept = records(written / "d.jsonl")
    assert 1.5e6 < sum(len(record["text"].encode()) for record in kept) < 6e6
    assert len(kept) > 800
    sources = [record["source"] for record in kept]
    heldout = [d for d in demo_documents() if d.is_heldout]
    assert {"pydoc:lambda", "stdlib:collections/OrderedDict"} <= {
        *sources,
        *(d.source for d in heldout),
    }
    assert all(set(record) == {"text", "source"} for record in kept)
    assert len({record["text"] for record in kept}) == len(kept)
    assert not [s for s in sources if "test" in s.split("/")[:-1] or "idlelib" in s]
    assert 0.02 < len(heldout) / (len(kept) + len(heldout)) < 0.06
    text = (written / "d.heldout.txt").read_text(encoding="utf-8")
    assert all(document.text in text for document in heldout)
    assert not {document.text for document in heldout} & {record["text"] for record in kept}


def test_every_stretch_is_a_fair_sample(written: Path) -> None:
    kept = records(written / "d.jsonl")
    tenth = len(kept) // 10
    overall = sum(record["source"].startswith("pydoc:") for record in kept) / len(kept)
    for start in range(0, 10 * tenth, tenth):
        part = kept[start : start + tenth]
        share = sum(record["source"].startswith("pydoc:") for record in part) / tenth
        assert abs(share - overall) < 0.12


def test_cloze_schema(written: Path) -> None:
    passages = records(written / "d.cloze.jsonl")
    assert 100 <= len(passages) <= 400
    for passage in passages:
        assert set(passage) == {"text"}
        *before, last = passage["text"].split()
        assert last.isalpha()
        assert last in " ".join(before)
    heldout = " ".join((written / "d.heldout.txt").read_text(encoding="utf-8").split())
    found = [passage["text"] in heldout for passage in passages]
    assert sum(found) > len(found) // 4  # the others leave out headings between their paragraphs


@pytest.mark.slow
def test_deterministic_and_skipped(
    written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["corpus", "demo", "--output", str(tmp_path / "d.jsonl"), "--cloze"]) == 0
    for name in ("d.jsonl", "d.heldout.txt", "d.cloze.jsonl"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    capfd.readouterr()
    assert main(["corpus", "demo", "--output", str(tmp_path / "d.jsonl"), "--cloze"]) == 0
    assert "skipped" in capfd.readouterr().err
    artifact = open_artifact(tmp_path / "d", "corpus")
    verify_lineage(artifact)
    for name in ("d.jsonl", "d.heldout.txt", "d.cloze.jsonl"):
        assert input_file(tmp_path / name, "corpus").digest == artifact.digest


@pytest.mark.slow
def test_without_heldout_nothing_is_left_out(written: Path, tmp_path: Path) -> None:
    assert main(["corpus", "demo", "--output", str(tmp_path / "d.jsonl")]) == 0
    everything = {record["text"] for record in records(tmp_path / "d.jsonl")}
    assert {record["text"] for record in records(written / "d.jsonl")} < everything
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl", "d.artifact.json"}


@pytest.mark.parametrize("output", ["d.txt", "folder/", "x/.jsonl"])
def test_output_names(output: str) -> None:
    assert main(["corpus", "demo", "--output", output]) == 2


SOURCE = '''
"""A module.

    Indented more."""
raise SystemExit("it was imported")

def documented(a, *, b=1):
    """Does something useful."""

def silent(): ...

class Outer:
    """An outer class."""
    def method(self):
        """Its method."""
    class Inner:
        """An inner class."""
'''


def test_sources_are_parsed_not_imported(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    (tmp_path / "pkg" / "broken.py").write_text("def (")
    (tmp_path / "pkg" / "test" / "skipped.py").write_text(SOURCE)
    found = {d.source: d.text for d in library_documents(tmp_path) if d.text}
    assert found == {
        "stdlib:pkg": "pkg\n\nA module.\n\nIndented more.\n\ndocumented(a, *, b=1)\n\n"
        "Does something useful.",
        "stdlib:pkg/Outer": "class pkg.Outer\n\nAn outer class.\n\nmethod(self)\n\nIts method.",
        "stdlib:pkg/Outer.Inner": "class pkg.Outer.Inner\n\nAn inner class.",
    }


def test_cloze_rule() -> None:
    long = "The parser keeps many words in memory while it reads the long input file slowly. "
    repeated = long + "At the end everything depends on what was first seen by the parser."
    unseen = long + "At the end everything depends on what was first seen by the compiler."
    assert cloze_passages([repeated, unseen, ">>> code\n\nshort."]) == [repeated[:-1]]


@pytest.mark.parametrize("name", ["c.jsonl", "c.heldout.txt", "c.cloze.jsonl"])
def test_files_of_others_stay(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("mine")
    line = ["corpus", "demo", "--output", str(tmp_path / "c.jsonl"), "--cloze"]
    assert main(line) == 4
    assert f"{name} exists" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
