"""A document's record: found in every format, past records left out, and never guessed."""

from __future__ import annotations

import gzip
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mtk.artifacts import open_artifact
from mtk.config import make
from mtk.config.preprocess import MergeConfig
from mtk.data import corpus_encoding
from mtk.data.dataset_artifact import open_dataset
from mtk.data.document_text import show_document
from mtk.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from mtk.data.provenance import find_origins
from stages import merge
from stages.preprocess import run
from tests.preprocess.corpora import QUIET, config, jsonl, tokenizer_in

BAD = '{"text": '
PREFIX = "out/P_text_document"


def lines(path: Path, records: list[str]) -> Path:
    path.write_text("".join(f"{record}\n" for record in records), encoding="utf-8")
    return path


def record(text: str) -> str:
    return json.dumps({"text": text, "id": 1}, ensure_ascii=False)


def check_all(folder: Path, texts: list[str], prefix: str = PREFIX) -> list[str]:
    """Every document's origin holds its text, at the bytes it is said to; returns them."""
    info = open_dataset(folder / prefix)
    found = find_origins(info, range(len(texts)))
    assert found.unknown == "" and sorted(found.found) == list(range(len(texts)))
    assert IndexedDataset(folder / prefix).num_documents == len(texts)
    places = []
    for number, text in enumerate(texts):
        origin = found.found[number]
        places.append(f"{Path(origin.file).name}:{origin.number}")
        held = origin.record.decode()
        assert (held.strip() if origin.plain else json.loads(held)["text"]) == text
        if origin.begin >= 0:
            raw = Path(origin.file).read_bytes()
            raw = gzip.decompress(raw) if origin.file.endswith(".gz") else raw
            assert raw[origin.begin : origin.end] == origin.record
        assert show_document(info, number).agreement == "same"
    return places


def test_records_left_out_are_passed(tmp_path: Path) -> None:
    texts = [f"Text number {i}: häuser" for i in range(30)] + ["", "last"]
    rows = [record(text) for text in texts]
    for at in (0, 5, 5, 20, len(rows) + 4):
        rows.insert(at, BAD)
    lines(tmp_path / "c.jsonl", rows)
    run(config(tmp_path, on_bad_line="skip", append_eod=True), QUIET)
    places = check_all(tmp_path, texts)
    good = [n for n, row in enumerate(rows, start=1) if row != BAD]
    assert places == [f"c.jsonl:{n}" for n in good]


@pytest.mark.parametrize("listed", [0, 1, 3])
def test_records_left_out_beyond_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: int
) -> None:
    monkeypatch.setattr(corpus_encoding, "LISTED", listed)
    texts = [f"Text {i}" for i in range(12)]
    rows = [record(text) for text in texts]
    for at in (1, 4, 4, 9, 12):
        rows.insert(at, BAD)
    lines(tmp_path / "c.jsonl", rows)
    run(config(tmp_path, on_bad_line="skip"), QUIET)
    check_all(tmp_path, texts)


def test_all_formats_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    texts = [[f"{kind} {n}" for n in range(4)] for kind in ("a", "b", "c", "d", "e")]
    lines(tmp_path / "a.jsonl", [record(text) for text in texts[0]])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write("".join(f"{record(text)}\n" for text in texts[1]))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in texts[2]], indent=1))
    (tmp_path / "d.txt").write_text("\n\n\n".join(texts[3]) + "\n")
    parquet.write_table(pyarrow.table({"text": texts[4]}), tmp_path / "e.parquet")
    names = ("a.jsonl", "b.jsonl.gz", "c.json", "d.txt", "e.parquet")
    files = tuple(str(tmp_path / name) for name in names)
    run(config(tmp_path, input=files, text_documents="blank-line"), QUIET)
    places = check_all(tmp_path, [text for part in texts for text in part])
    numbers = {"a.jsonl": (1, 2, 3, 4), "d.txt": (1, 4, 7, 10)}
    wanted = [f"{name}:{n}" for name in names for n in numbers.get(name, (1, 2, 3, 4))]
    assert places == wanted


def test_two_files_of_one_name_with_bad_records(tmp_path: Path) -> None:
    """The list of bad records must not be read as of the other file."""
    for folder, rows in (("x", [record("1"), record("2")]), ("y", [record("3"), BAD])):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "c.jsonl", rows)
    files = (str(tmp_path / "x" / "c.jsonl"), str(tmp_path / "y" / "c.jsonl"))
    run(config(tmp_path, input=files, on_bad_line="skip"), QUIET)
    assert check_all(tmp_path, ["1", "2", "3"]) == ["c.jsonl:1", "c.jsonl:2", "c.jsonl:1"]


def test_sentences_and_several_keys(tmp_path: Path) -> None:
    rows = [{"text": f"One {n}. Two.", "title": f"T{n}"} for n in range(6)]
    jsonl(tmp_path / "c.jsonl", rows)
    run(config(tmp_path, json_keys=("text", "title"), split_sentences=True), QUIET)
    for key in ("text", "title"):
        shown = show_document(open_dataset(tmp_path / f"out/P_{key}_sentence"), 4)
        assert shown.agreement == "same" and shown.origin is not None
        assert shown.origin.number == 5
        assert len(shown.sequences) == (2 if key == "text" else 1)


def two_merged(tmp_path: Path) -> list[str]:
    texts = [f"a{n}" for n in range(3)], [f"b{n}" for n in range(4)]
    tokenizer_in(tmp_path)
    for name, own in zip(("A", "B"), texts, strict=True):
        lines(tmp_path / f"{name}.jsonl", [BAD, *map(record, own)])
        more: dict[str, Any] = {"input": (str(tmp_path / f"{name}.jsonl"),)}
        more["output_prefix"] = str(tmp_path / "parts" / name)
        run(config(tmp_path, on_bad_line="skip", **more), QUIET)
    options = {"input": str(tmp_path / "parts"), "output_prefix": str(tmp_path / "all")}
    merge.run(make(MergeConfig, **options), QUIET)
    return [*texts[0], *texts[1]]


def test_through_a_merge(tmp_path: Path) -> None:
    texts = two_merged(tmp_path)
    found = find_origins(open_dataset(tmp_path / "all"), range(7))
    assert [json.loads(found.found[n].record)["text"] for n in range(7)] == texts
    assert [found.found[n].number for n in range(7)] == [2, 3, 4, 2, 3, 4, 5]
    shutil.rmtree(tmp_path / "parts")
    assert (
        "what was merged is not there" in find_origins(open_dataset(tmp_path / "all"), [0]).unknown
    )


def test_a_corpus_that_moved_along_is_found(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    jsonl(here / "c.jsonl", [{"text": "one"}, {"text": "two"}])
    run(config(here), QUIET)
    here.rename(tmp_path / "there")
    assert check_all(tmp_path / "there", ["one", "two"]) == ["c.jsonl:1", "c.jsonl:2"]


def test_a_corpus_that_changed_is_not_believed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", [{"text": "one"}, {"text": "two"}])
    run(config(tmp_path), QUIET)
    info = open_dataset(tmp_path / PREFIX)
    path.write_text(record("other") + "\n" + path.read_text())
    found = find_origins(info, [0])
    assert not found.found and "c.jsonl (corpus) is not what was used" in found.unknown
    # Whoever leaves the digest out is told by the ids.
    assert show_document(info, 0, verify_digest=False).agreement == "different"
    path.unlink()
    found = find_origins(info, [0])
    assert not found.found and "c.jsonl is gone" in found.unknown


def test_without_a_manifest(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "raw", "<u2") as writer:
        writer.add_document([1, 2, 3], [3])
    shown = show_document(open_dataset(tmp_path / "raw"), 0)
    assert shown.origin is None and "has no manifest" in shown.unknown
    assert shown.sequences == ((1, 2, 3),) and shown.text is None


def test_a_corpus_of_mtk_itself(tmp_path: Path) -> None:
    """Its manifest records an artifact, not a file."""
    from mtk.config.corpus import DemoCorpusConfig
    from stages import corpus

    prefix = str(tmp_path / "demo.jsonl")
    corpus.run(make(DemoCorpusConfig, output=prefix), QUIET)
    records = [json.loads(line) for line in Path(prefix).read_text().splitlines()]
    run(config(tmp_path, input=(prefix,)), QUIET)
    info = open_dataset(tmp_path / PREFIX)
    last = len(records) - 1
    shown = show_document(info, last)
    assert shown.agreement == "same" and shown.origin is not None
    assert shown.origin.number == last + 1
    assert info.artifact is not None and open_artifact(prefix).kind == "corpus"
    starts = IndexedDataset(tmp_path / PREFIX).document_indices.tolist()
    assert all(end - begin <= 1 for begin, end in pairwise(starts))
