"""What a run counts as its input: the same command is skipped, a changed file never is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from mtk.artifacts import InputRecord, publish_directory
from mtk.cli.main import main
from mtk.config import make
from mtk.config.corpus import DemoCorpusConfig
from mtk.config.tokenizer import TrainTokenizerConfig
from mtk.errors import ArtifactError, ConfigError, DataError
from mtk.tokenizers.base import DESCRIPTION
from stages import preprocess, tokenizer
from stages.preprocess import corpus_inputs
from tests.preprocess.corpora import QUIET, config, corpus
from tests.tokenizers.samples import gpt2_files, trained


def edited_merges(folder: Path) -> Path:
    gpt2_files(folder)
    (folder / "v.json").rename(folder / "vocab.json")
    (folder / "m.txt").rename(folder / "merges.txt")
    return folder / "merges.txt"


def edited_config(folder: Path) -> Path:
    trained("bpe").save(folder)
    (folder / DESCRIPTION).unlink()
    return folder / "tokenizer_config.json"


@pytest.mark.parametrize(
    ("make_files", "kind", "model", "edit"),
    [
        (edited_merges, "GPT2BPETokenizer", "", lambda text: text.replace("Ġ m\n", "")),
        (edited_config, None, "", lambda text: text.replace("<|endoftext|>", "!")),
        (
            edited_config,
            "HuggingFaceTokenizer",
            "tokenizer.json",
            lambda text: text.replace("<|endoftext|>", "!"),
        ),
    ],
    ids=["merges", "config", "file"],
)
def test_every_file_of_a_tokenizer_counts(
    make_files: Callable[[Path], Path],
    kind: str | None,
    model: str,
    edit: Callable[[str], str],
    tmp_path: Path,
) -> None:
    corpus(tmp_path, ["the model"])
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    file = make_files(folder)
    chosen = config(
        tmp_path, tokenizer_type=kind, tokenizer_model=str(folder / model), append_eod=True
    )
    first = preprocess.run(chosen, QUIET)
    assert preprocess.run(chosen, QUIET).timings == first.timings
    file.write_text(edit(file.read_text()))
    with pytest.raises(ArtifactError, match="other inputs"):
        preprocess.run(chosen, QUIET)


def test_the_tokenizer_of_a_model_folder(tmp_path: Path) -> None:
    corpus(tmp_path)
    model = tmp_path / "hf"
    with publish_directory(
        model, kind="hf_model", stage="convert", config=make(DemoCorpusConfig, output="c.jsonl")
    ) as publication:
        trained("bpe").save(publication.folder)
    artifact = preprocess.run(config(tmp_path, tokenizer_model=str(model)), QUIET)
    assert [record.kind for record in artifact.inputs] == ["file", "hf_model"]


def test_a_glob_beside_the_outputs_is_skipped_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path)
    with (tmp_path / "c.jsonl").open("a") as stream:
        stream.write("broken\n")
    trained("bpe").save(tmp_path / "tok")
    line = ["preprocess", "--input", f"{tmp_path}/*.json*", "--output-prefix", f"{tmp_path}/P"]
    line += ["--tokenizer-model", str(tmp_path / "tok"), "--on-bad-line", "skip"]
    assert main(line) == 0
    assert json.loads((tmp_path / "P.bad_lines.jsonl").read_text())["reason"] == "invalid JSON"
    capfd.readouterr()
    assert main(line) == 0
    assert "skipped" in capfd.readouterr().err


@pytest.mark.parametrize("place", [".", "..", "out/.", "out/..", "out/", ""])
@pytest.mark.parametrize(
    "line",
    [
        ["preprocess", "--input", "c.jsonl", "--tokenizer-model", "tok", "--output-prefix"],
        ["merge", "--input", ".", "--output-prefix"],
    ],
    ids=["preprocess", "merge"],
)
def test_an_output_without_a_name(
    line: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*line, place]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize("output", [".jsonl", "..jsonl", "out/.jsonl", "out/..jsonl"])
def test_a_corpus_without_a_name(output: str) -> None:
    with pytest.raises(ConfigError, match="file name"):
        make(DemoCorpusConfig, output=output)


@pytest.mark.parametrize("output", ["", ".", "..", "out/.."])
def test_a_tokenizer_without_a_name(output: str) -> None:
    with pytest.raises(ConfigError, match="name of a folder"):
        make(TrainTokenizerConfig, input=("c.jsonl",), output=output)


@pytest.mark.parametrize("stage", [preprocess, tokenizer], ids=["preprocess", "tokenizer"])
def test_a_corpus_that_changes_after_it_was_hashed(
    stage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus(tmp_path)

    def hashed_then_changed(files: Sequence[Path]) -> list[InputRecord]:
        records = corpus_inputs(files)
        path.write_text('{"text": "another text"}\n')
        return records

    monkeypatch.setattr(stage, "corpus_inputs", hashed_then_changed)
    output = str(tmp_path / "out" / "P")
    chosen = (
        config(tmp_path)
        if stage is preprocess
        else make(TrainTokenizerConfig, input=(str(path),), output=output, vocab_size=300)
    )
    with pytest.raises(DataError, match="changed while it was read"):
        stage.run(chosen, QUIET)
    assert not any((tmp_path / "out").iterdir())
