"""``mtk data`` as a program: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtk.cli.data_commands import runs, spelled
from mtk.cli.main import main
from mtk.config import make, to_dict
from mtk.config.preprocess import PreprocessConfig
from stages.preprocess import run
from stages.pretrain import run as pretrain
from tests.audit.test_trace import options
from tests.preprocess.corpora import QUIET, config, jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    rows = [{"text": f"word {n} " * 9} for n in range(80)]
    jsonl(folder / "c.jsonl", rows)
    run(config(folder, output_prefix=str(folder / "A"), append_eod=True), QUIET)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "title", "."]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    sentences = [{"text": "One two three. Two one. Three one two.", "title": "title one"}] * 30
    jsonl(folder / "s.jsonl", sentences)
    words = make(
        PreprocessConfig,
        input=[str(folder / "s.jsonl")],
        output_prefix=str(folder / "S"),
        json_keys=("text", "title"),
        split_sentences=True,
        tokenizer_type="BertWordPieceLowerCase",
        vocab_file=str(folder / "vocab.txt"),
        workers=1,
    )
    run(words, QUIET)
    return folder


def last(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def test_show_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(folder / "A_text_document")
    assert main(["data", "show", prefix, "--document", "4"]) == 0
    out = capsys.readouterr().out
    assert "c.jsonl, line 5 (bytes" in out and "tokenized again it gives the same ids" in out
    assert "word 4 word 4" in out
    assert main(["data", "show", prefix, "--document", "4", "--json"]) == 0
    shown = last(capsys.readouterr().out)
    assert shown["origin"]["number"] == 5 and shown["agreement"] == "same"


@pytest.mark.parametrize("family", ["bert", "ict", "gpt"])
def test_show_sample(folder: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(folder / "S_text_sentence")
    more = ["--titles-data-path", str(folder / "S_title_sentence")] if family == "ict" else []
    length = ["--seq-length", "24", "--family", family]
    assert main(["data", "show", prefix, "--sample", "2", *length, *more, "--json"]) == 0
    shown = last(capsys.readouterr().out)
    assert shown["sample"] == 2 and shown["documents"][0]["origin"]["file"].endswith("s.jsonl")
    name = "context_tokens" if family == "ict" else "tokens"
    assert len(shown["content"][name]) == 24
    assert main(["data", "show", prefix, "--sample", "2", *length, *more]) == 0
    text = capsys.readouterr().out
    assert ("[CLS] title one [SEP]" in text) == (family == "ict")
    assert ("[CLS]" in text) == (family != "gpt")


def test_stats_and_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, plot = str(folder / "A_text_document"), str(folder / "l.png")
    assert main(["data", "stats", prefix, "--plot", plot, "--top", "2", "--json"]) == 0
    found = last(capsys.readouterr().out)
    assert found["documents"]["count"] == 80 and found["tokens_of"]["eod_count"] == 80
    assert found["tokens_of"]["unended"] == 0 and len(found["tokens_of"]["common"]) == 2
    assert Path(plot).is_file()
    assert main(["data", "stats", prefix]) == 0
    assert "80 documents, 80 sequences" in capsys.readouterr().out
    assert main(["data", "check", prefix]) == 0
    assert "all ids lie in the vocabulary" in capsys.readouterr().out


def test_trace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = options(folder, folder / "ck")
    pretrain(settings, QUIET)
    assert main(["data", "trace", "--step", "2", "--load", str(folder / "ck")]) == 0
    text = capsys.readouterr().out
    assert "step 2: samples 8 to 15 of 48, 1 data-parallel ranks" in text
    assert "c.jsonl, line " in text
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(settings)))
    by_file = ["data", "trace", "--step", "2", "--config", str(folder / "run.yaml"), "--json"]
    assert main([*by_file, "--data-parallel-size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["sample"] * 8 + ["result"]
    assert {line["rank"] for line in lines[:-1]} == {0, 1}
    assert all(
        d["origin"]["number"] == d["document"] + 1 for x in lines[:-1] for d in x["documents"]
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["show", "P"], 2, "give exactly one of --document and --sample"),
        (["show", "P", "--document", "80"], 2, "must be one of the documents 0 to 79"),
        (["show", "P", "--sample", "0", "--family", "x"], 2, "must be one of gpt, bert, t5, ict"),
        (["show", "P", "--sample", "0", "--data-order", "x"], 2, "must be one of epochs, megatron"),
        (["show", "P", "--sample", "-1"], 2, "must not be negative"),
        (
            ["show", "P", "--sample", "0", "--seq-length", "0"],
            2,
            "seq_length = 0: must be at least 1",
        ),
        (["show", "P", "--sample", "0", "--titles-data-path", "t"], 2, "belongs to --family ict"),
        (["show", "P", "--sample", "0", "--family", "bert"], 2, "needs cls, sep, mask"),
        (["show", "missing", "--document", "0"], 3, "missing.bin does not exist"),
        (["stats", "P", "--plot", "x.pdf"], 2, "must end in .png"),
        (["check", "missing"], 3, "missing.bin does not exist"),
        (["trace", "--step", "1"], 2, "give exactly one of --load CHECKPOINT and --config FILE"),
        (["trace", "--step", "1", "--load", "nowhere"], 4, "nowhere is not a checkpoint"),
        (["trace", "--step", "1", "--config", "c", "--stage", "x"], 2, "pretrain or finetune"),
    ],
)
def test_mistakes(
    folder: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "A_text_document") if word == "P" else word for word in words]
    assert main(["data", *words]) == code
    assert message in capsys.readouterr().err


def test_long_fields_are_shortened() -> None:
    assert runs([1.0] * 1024) == "1.0 x 1,024"
    assert runs([1, 1, 0]) == "1 x 2, 0"
    assert runs(True) == "True"
    shortened = runs(list(range(100)))
    assert shortened.startswith("0, 1, 2, 3, 4, 5, 6, 7, ..., 92, ")
    assert shortened.endswith("99 (100 in all; --json has every one)")


class Bytes:
    """A tokenizer of bytes with one special token."""

    def __init__(self, *, exact: bool) -> None:
        self.exact_bytes = exact

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == 0 else bytes([token])

    def piece(self, token: int) -> str:
        return "<eod>" if token == 0 else f"b{token}"


def test_tokens_are_spelled_with_special_ones_by_name() -> None:
    ids = [*"hé".encode(), 0]
    assert spelled(Bytes(exact=True), ids) == "hé<eod>"  # type: ignore[arg-type]
    assert spelled(Bytes(exact=False), [104, 0]) == "b104 <eod>"  # type: ignore[arg-type]
