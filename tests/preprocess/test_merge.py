"""``mtk merge``: order, tokenizer and level checks, what the merged artifact says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtk.artifacts import open_artifact, verify_lineage
from mtk.cli.main import main
from mtk.data.dataset_artifact import open_dataset
from tests.preprocess.corpora import command, documents, jsonl, tokenizer_in
from tests.tokenizers.samples import trained


def parts(folder: Path, *more: str) -> None:
    for name, texts in (("b", ["three", ""]), ("a", ["one", "two"])):
        path = jsonl(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        places = ("--input", str(path), "--output-prefix", str(folder / "in" / name))
        assert main(command(folder, *places, *more)) == 0


def merge(folder: Path, *more: str) -> int:
    base = ["merge", "--input", str(folder / "in"), "--output-prefix", str(folder / "out/M")]
    return main([*base, *more])


def test_merge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts(tmp_path, "--append-eod")
    assert merge(tmp_path) == 0
    tokenizer = tokenizer_in(tmp_path)
    expected = [[[*tokenizer.encode(text), tokenizer.eod]] for text in ("one", "two", "three")]
    assert documents(tmp_path / "out/M") == [*expected, []]
    info = open_dataset(tmp_path / "out/M")
    assert info.tokenizer_fingerprint == tokenizer.fingerprint
    assert info.tokenizer_folder is not None
    assert (info.vocab_size, info.eod) == (tokenizer.vocab_size, tokenizer.eod)
    artifact = open_artifact(tmp_path / "out/M", "dataset")
    assert [record.role for record in artifact.inputs] == [
        "dataset a_text_document",
        "dataset b_text_document",
    ]
    assert artifact.metrics["documents"] == 4
    verify_lineage(artifact)
    capfd.readouterr()
    assert merge(tmp_path) == 0
    assert "skipped" in capfd.readouterr().err


def test_another_tokenizer_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts(tmp_path)
    jsonl(tmp_path / "c.jsonl", [{"text": "x"}])
    trained("bpe", 300).save(tmp_path / "other")
    more = ("--output-prefix", str(tmp_path / "in/c"), "--tokenizer-model", str(tmp_path / "other"))
    assert main(command(tmp_path, *more)) == 0
    assert merge(tmp_path) == 3
    assert "fingerprint" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert merge(tmp_path, "--match", "[ab]_*") == 0


def test_other_levels_and_eod_habits_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts(tmp_path)
    jsonl(tmp_path / "c.jsonl", [{"text": "x. Y."}])
    prefix = ("--output-prefix", str(tmp_path / "in/c"))
    assert main(command(tmp_path, *prefix, "--append-eod")) == 0
    assert merge(tmp_path) == 3
    assert "--append-eod" in capfd.readouterr().err
    assert main(command(tmp_path, *prefix, "--split-sentences", "--force")) == 0
    assert merge(tmp_path) == 3
    assert "level" in capfd.readouterr().err
    assert merge(tmp_path, "--match", "*_document") == 0


def test_foreign_datasets_are_merged_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts(tmp_path)
    (tmp_path / "in/a.artifact.json").unlink()
    assert merge(tmp_path) == 0
    assert "no manifest" in capfd.readouterr().err
    assert open_dataset(tmp_path / "out/M").tokenizer_fingerprint is None


@pytest.mark.parametrize("half", ["bin", "idx"])
def test_halves_are_refused(half: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts(tmp_path)
    (tmp_path / "in" / f"lonely.{half}").write_bytes(b"")
    assert merge(tmp_path) == 3
    assert f"lonely.{half} has no other half" in capfd.readouterr().err


def test_nothing_to_merge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert merge(tmp_path) == 3
    parts(tmp_path)
    assert merge(tmp_path, "--match", "z*") == 3
    assert "no dataset" in capfd.readouterr().err


def test_into_the_same_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The result of an earlier run is not an input of the next."""
    parts(tmp_path)
    into = ("--output-prefix", str(tmp_path / "in/M"))
    assert main(["merge", "--input", str(tmp_path / "in"), *into]) == 0
    assert main(["merge", "--input", str(tmp_path / "in"), *into]) == 0
    assert "skipped" in capfd.readouterr().err
    assert len(documents(tmp_path / "in/M")) == 4


@pytest.mark.parametrize("way", ["in/../in/M", "link/M"])
def test_into_the_same_folder_by_another_way(way: str, tmp_path: Path) -> None:
    parts(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    line = ["merge", "--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / way)]
    for force in ([], [], ["--force"]):
        assert main([*line, *force]) == 0
        assert len(documents(tmp_path / "in/M")) == 4


def test_only_the_output_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts(tmp_path)
    line = ["merge", "--input", str(tmp_path / "in"), "--match", "a_*"]
    assert main([*line, "--output-prefix", str(tmp_path / "in/a_text_document")]) == 3
    assert "no dataset" in capfd.readouterr().err
