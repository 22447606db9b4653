"""What is written, against the plainest correct version; workers; completeness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtk.artifacts import open_artifact, verify, verify_lineage
from mtk.artifacts.staging import staging_prefix
from mtk.cli.main import main
from mtk.config.preprocess import PreprocessConfig
from mtk.data.dataset_artifact import open_dataset
from mtk.data.indexed_dataset import IndexedDataset
from mtk.errors import ArtifactError, ConfigError, DataError
from stages import preprocess
from tests.preprocess.corpora import (
    QUIET,
    TEXTS,
    command,
    config,
    contents,
    corpus,
    documents,
    jsonl,
    tokenizer_in,
)


def run(folder: Path, **values: object) -> Path:
    return preprocess.run(config(folder, **values), QUIET).path


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_against_the_plain_version(tmp_path: Path, append_eod: bool) -> None:
    corpus(tmp_path)
    prefix = run(tmp_path, append_eod=append_eod)
    tokenizer = tokenizer_in(tmp_path)
    expected = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        expected.append([ids + [tokenizer.eod] * append_eod] if ids else [])
    assert documents(f"{prefix}_text_document") == expected
    assert sum(not document for document in expected) == 10  # empty documents were there
    artifact = open_artifact(prefix, "dataset")
    verify(artifact)
    assert artifact.metrics["keys"]["text"] == {
        "documents": len(TEXTS),
        "sequences": sum(len(document) for document in expected),
        "tokens": sum(len(ids) for document in expected for ids in document),
        "text_bytes": sum(len(text.encode()) for text in TEXTS),
    }
    assert artifact.metrics["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert artifact.metrics["vocab_size"] == tokenizer.vocab_size
    assert (artifact.metrics["eod"], artifact.metrics["bad_records"]) == (tokenizer.eod, 0)
    verify_lineage(artifact)


def test_several_keys_and_ready_made_sentences(tmp_path: Path) -> None:
    records = [
        {"text": ["One.", "", "Two three."], "title": "T"},
        {"text": "Plain. Text.", "title": ""},
        {"text": [], "title": ["only", "two"]},
        {"text": ["Single. But ready-made."], "title": "x"},
    ]
    jsonl(tmp_path / "c.jsonl", records)
    tokenizer = tokenizer_in(tmp_path)
    for split in (False, True):
        prefix = run(
            tmp_path,
            json_keys=("text", "title"),
            append_eod=True,
            split_sentences=split,
            output_prefix=str(tmp_path / f"P{split}"),
        )
        level = "sentence" if split else "document"

        def ids(*texts: str) -> list[list[int]]:
            found = [tokenizer.encode(text) for text in texts]
            return [*found[:-1], [*found[-1], tokenizer.eod]]

        plain = ids("Plain.", "Text.") if split else ids("Plain. Text.")
        assert documents(f"{prefix}_text_{level}") == [
            ids("One.", "Two three."),
            plain,
            [],
            ids("Single. But ready-made."),
        ]
        assert documents(f"{prefix}_title_{level}") == [
            ids("T"),
            [],
            ids("only", "two"),
            ids("x"),
        ]


def test_keep_newlines_is_lossless(tmp_path: Path) -> None:
    corpus(tmp_path)
    prefix = run(tmp_path, split_sentences=True, keep_newlines=True)
    tokenizer = tokenizer_in(tmp_path)
    stored = documents(f"{prefix}_text_sentence")
    joined = ["".join(tokenizer.decode(ids) for ids in document) for document in stored]
    assert joined == TEXTS
    assert max(len(document) for document in stored) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_workers_do_not_change_a_byte(tmp_path: Path, split: bool) -> None:
    corpus(tmp_path, TEXTS * 30)
    bad = (tmp_path / "c.jsonl").read_text().splitlines()
    bad[1500] = "{"
    bad[2000] = "[]"
    (tmp_path / "c.jsonl").write_text("\n".join(bad) + "\n")
    found = []
    for workers in (1, 2):
        folder = tmp_path / f"out{workers}"
        run(
            tmp_path,
            output_prefix=str(folder / "P"),
            workers=workers,
            split_sentences=split,
            append_eod=True,
            on_bad_line="skip",
        )
        found.append(contents(folder))
    assert found[0] == found[1]
    assert "P.bad_lines.jsonl" in found[0]
    assert ("P.punkt.json" in found[0]) == split


def test_the_same_command_is_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path)
    assert main(command(tmp_path)) == 0
    before = (tmp_path / "out/P.artifact.json").read_bytes()
    assert main(command(tmp_path, "--workers", "2")) == 0  # workers cannot change the result
    assert "skipped" in capfd.readouterr().err
    assert (tmp_path / "out/P.artifact.json").read_bytes() == before
    # Another configuration or other inputs are not overwritten unasked.
    assert main(command(tmp_path, "--append-eod")) == 4
    assert "--force" in capfd.readouterr().err
    corpus(tmp_path, TEXTS[:20])
    assert main(command(tmp_path)) == 4
    assert main(command(tmp_path, "--force")) == 0
    assert IndexedDataset(tmp_path / "out/P_text_document").num_documents == 20


def test_force_removes_what_is_not_replaced(tmp_path: Path) -> None:
    jsonl(tmp_path / "c.jsonl", [{"text": "a", "title": "b"}])
    assert main(command(tmp_path, "--json-keys", "text", "title")) == 0
    assert main(command(tmp_path, "--json-keys", "text", "--force")) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "P.artifact.json",
        "P.tokenizer",
        "P_text_document.bin",
        "P_text_document.idx",
    }


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    corpus(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/P_text_document.bin").write_bytes(b"precious")
    with pytest.raises(ArtifactError, match="--force"):
        run(tmp_path)
    assert (tmp_path / "out/P_text_document.bin").read_bytes() == b"precious"


def test_a_killed_publication_is_continued(tmp_path: Path) -> None:
    """Data files without a marker and a staging folder of a dead process: start over."""
    corpus(tmp_path)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead = staging_prefix("P").replace(f"-{os.getpid()}-", f"-{done.pid}-x")
    (tmp_path / "out" / dead).mkdir(parents=True)
    (tmp_path / "out/P_text_document.bin").write_bytes(b"half")
    run(tmp_path)
    assert IndexedDataset(tmp_path / "out/P_text_document").num_documents == len(TEXTS)
    assert not list((tmp_path / "out").glob(".*"))


def test_open_dataset(tmp_path: Path) -> None:
    corpus(tmp_path)
    prefix = run(tmp_path)
    info = open_dataset(f"{prefix}_text_document")
    tokenizer = tokenizer_in(tmp_path)
    assert info.artifact is not None
    assert info.tokenizer_folder == tmp_path / "out/P.tokenizer"
    assert info.tokenizer_fingerprint == tokenizer.fingerprint
    assert (info.vocab_size, info.eod) == (tokenizer.vocab_size, tokenizer.eod)
    record = info.input_record("training data")
    assert (record.kind, record.digest) == ("dataset", info.artifact.digest)
    assert len(info.open()) == len(documents(info.prefix)) - 10
    assert open_dataset(f"{prefix}_text_document.idx").prefix == info.prefix

    for wrong, words in (
        ("P_text_documnt", "Did you mean"),
        ("P", "Did you mean"),
        ("zzz", "Datasets in"),
        ("../nowhere/P", "no folder"),
        ("../P", "holds no dataset"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(tmp_path / "out" / wrong)
    with (tmp_path / "out/P_text_document.bin").open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(ArtifactError, match="bytes"):
        open_dataset(f"{prefix}_text_document")


def test_open_foreign_dataset(tmp_path: Path) -> None:
    corpus(tmp_path)
    prefix = run(tmp_path)
    for suffix in ("bin", "idx"):
        Path(f"{prefix}_text_document.{suffix}").rename(tmp_path / f"foreign.{suffix}")
    info = open_dataset(tmp_path / "foreign")
    assert (info.artifact, info.tokenizer_fingerprint, info.vocab_size) == (None, None, None)
    record = info.input_record("data")
    assert record.kind == "file"
    assert len({record.digest, record.inputs[0].digest}) == 2


def test_the_manifest_repeats_the_run(tmp_path: Path) -> None:
    corpus(tmp_path)
    run(tmp_path, append_eod=True)
    marker = str(tmp_path / "out/P.artifact.json")
    again = ["preprocess", "--config", marker, "--output-prefix", str(tmp_path / "again/P")]
    assert main(again) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_the_tokenizer_of_a_dataset_serves_again(tmp_path: Path) -> None:
    corpus(tmp_path)
    first = run(tmp_path, append_eod=True)
    again = run(
        tmp_path,
        append_eod=True,
        tokenizer_model=f"{first}.tokenizer",
        output_prefix=str(tmp_path / "again/P"),
    )
    assert contents(again.parent) == contents(first.parent)


def test_json_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path)
    assert main(command(tmp_path, "--json")) == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["event"] == "result"
    assert last["metrics"]["keys"]["text"]["documents"] == len(TEXTS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"json_keys": ()}, ["json_keys"]),
        ({"json_keys": ("a", "a")}, ["twice"]),
        ({"json_keys": ("a/b",)}, ["file name"]),
        ({"keep_newlines": True}, ["--split-sentences"]),
        ({"workers": 0}, ["Nearest: 1"]),
        ({"max_bad_fraction": 0.1}, ["--on-bad-line skip"]),
        ({"max_bad_fraction": 1.5, "on_bad_line": "skip"}, ["Nearest: 1.0"]),
        ({"output_prefix": "x/"}, ["Nearest: x/corpus"]),
        ({"tokenizer_model": None}, ["no tokenizer chosen"]),
        ({"workers": 0, "keep_newlines": True}, ["workers", "keep_newlines", "2 problems"]),
    ],
)
def test_option_rules(values: dict[str, object], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **values)
    assert [word for word in words if word not in str(caught.value)] == []


def test_megatron_flags_are_known() -> None:
    from mtk.config import leaves

    names = {leaf.name for leaf in leaves(PreprocessConfig)}
    assert {
        "input",
        "output_prefix",
        "json_keys",
        "split_sentences",
        "keep_newlines",
        "append_eod",
        "lang",
        "workers",
        "tokenizer_type",
        "vocab_file",
        "merge_file",
        "tokenizer_model",
        "vocab_size",
        "vocab_extra_ids",
    } <= names


@pytest.mark.skipif(os.name != "posix", reason="permissions of a POSIX system")
def test_input_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus(tmp_path)
    original = preprocess.read_chunks

    def appending(*arguments: object, **options: object) -> object:
        yield from original(*arguments, **options)  # type: ignore[arg-type]
        with path.open("a") as stream:
            stream.write('{"text": "late"}\n')

    monkeypatch.setattr(preprocess, "read_chunks", appending)
    with pytest.raises(DataError, match="changed while it was read"):
        run(tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
