"""An engine that is caught with a wrong id has no say in what is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtk.artifacts import open_artifact
from mtk.artifacts.parts import parts_folder
from mtk.cli.main import main
from mtk.data import checked_encoding, corpus_encoding, sources
from mtk.data.checked_encoding import CheckedEncoder, EngineMismatchError
from mtk.data.corpus_encoding import CorpusParts
from mtk.tokenizers.flat import Flat, ReferenceEncoder
from stages import preprocess
from tests.preprocess.corpora import QUIET, command, config, contents, jsonl, tokenizer_in

DOCUMENTS = [f"document {index} of some words" for index in range(3000)]


class Wrong:
    """Right but for one document, where a single id is another."""

    name = "wrong"

    def __init__(self, tokenizer: Any, at: str) -> None:
        self._right, self._at = ReferenceEncoder(tokenizer), at

    def encode(self, texts: Sequence[str]) -> Flat:
        ids, lengths = self._right.encode(texts)
        if self._at in texts:
            ids[-1] += 1
        return ids, lengths


def install(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    original = checked_encoding.choose_engine
    monkeypatch.setattr(
        checked_encoding,
        "choose_engine",
        lambda tokenizer, wanted="auto": (
            original(tokenizer, wanted) if wanted == "reference" else Wrong(tokenizer, at)
        ),
    )


@pytest.mark.parametrize(
    ("number", "place"), [(1, "record 1 of"), (2018, "record 2018 of")], ids=["first", "late"]
)
def test_the_bytes_are_the_tokenizers(
    number: int,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Late: every 1009th record is looked at, and four parts were finished before."""
    jsonl(tmp_path / "c.jsonl", [{"text": text} for text in DOCUMENTS])
    base = command(tmp_path, "--tokenizer-engine", "reference")
    assert main([*base, "--output-prefix", str(tmp_path / "right/P")]) == 0
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)  # a record a chunk
    monkeypatch.setattr(corpus_encoding, "PART_BYTES", 20_000)
    monkeypatch.setattr(checked_encoding, "FIRST_CHARACTERS", 500)
    install(monkeypatch, DOCUMENTS[number - 1])
    assert main(command(tmp_path)) == 0
    message = " ".join(capfd.readouterr().err.split())
    assert place in message
    assert "encoded again by the tokenizer itself" in message
    assert contents(tmp_path / "out") == contents(tmp_path / "right")
    metrics = open_artifact(tmp_path / "out/P", "dataset").metrics
    assert metrics["tokenizer_engine"] == "reference"


def test_after_a_fallback_a_killed_run_stays_with_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "c.jsonl", [{"text": text} for text in DOCUMENTS])
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(corpus_encoding, "PART_BYTES", 20_000)
    install(monkeypatch, DOCUMENTS[29])  # the last of the first chunk
    original, done = CorpusParts.add, 0

    def add(self: CorpusParts, *arguments: Any, **options: Any) -> bool:
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CorpusParts, "add", add)
        preprocess.run(config(tmp_path), QUIET)
    facts = json.loads((parts_folder(tmp_path / "out/P") / "00000001/part.json").read_text())
    assert facts["engine"] == "reference"
    # The engine would be wrong without being caught from here on.
    install(monkeypatch, DOCUMENTS[-1])
    artifact = preprocess.run(config(tmp_path), QUIET)
    assert artifact.metrics["tokenizer_engine"] == "reference"


def test_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_in(tmp_path)
    monkeypatch.setattr(checked_encoding, "FIRST_CHARACTERS", 10)
    encoder = CheckedEncoder(tokenizer, "auto")
    assert encoder.engine == "fastokens"
    encoder.encode([["six", "abc"], ["12345"], ["not"]], [5, 6, 7], "f")
    assert encoder.compared == 2  # 11 characters
    encoder.encode([["a"], ["b"], ["c"]], [1008, 1009, 1010], "f")
    assert encoder.compared == 3
    encoder.encode([["x" * (checked_encoding.LARGEST_COMPARED + 1)]], [2018], "f")
    assert encoder.compared == 3
    assert CheckedEncoder(tokenizer, "reference").engine == "reference"
    install(monkeypatch, "b")
    wrong = CheckedEncoder(tokenizer, "auto")
    with pytest.raises(EngineMismatchError, match="wrong gave other ids for record 3 of f"):
        wrong.encode([["a"], ["c"], ["b"]], [1, 2, 3], "f")


@pytest.mark.slow
def test_a_worker_that_finds_it_says_so(tmp_path: Path) -> None:
    """The exception travels between processes with what it knows."""
    import pickle

    error = pickle.loads(pickle.dumps(EngineMismatchError("fastokens", "record 3 of f")))
    assert (error.engine, error.place) == ("fastokens", "record 3 of f")
    jsonl(tmp_path / "c.jsonl", [{"text": text} for text in DOCUMENTS])
    one = preprocess.run(config(tmp_path), QUIET)
    two = preprocess.run(config(tmp_path, workers=2, output_prefix=str(tmp_path / "w2/P")), QUIET)
    assert one.metrics["tokenizer_engine"] == two.metrics["tokenizer_engine"] == "fastokens"
    assert two.metrics["compared_records"] >= 1000
    assert contents(one.folder) == contents(two.folder)
