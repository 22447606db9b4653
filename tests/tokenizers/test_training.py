"""Trained vocabularies: the same bytes from the same corpus in any process; nothing unknown."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtk.cli.main import main
from mtk.tokenizers import load_tokenizer
from mtk.tokenizers.unigram import _expect, _without, train_unigram
from tests.tokenizers.samples import CORPUS, trained

KINDS = ["bpe", "unigram", "wordpiece"]
PROGRAM = """
import hashlib, sys
from tests.tokenizers.samples import trained
t = trained(sys.argv[1])
contents = {**t.transformers_files(), **t.files}
print(hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_across_processes(kind: str) -> None:
    found = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
        )
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_all_bytes_are_tokens(kind: str) -> None:
    tokenizer = trained(kind)
    known = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    assert [byte for byte in range(256) if bytes([byte]) not in known] == []


@pytest.mark.parametrize("kind", KINDS)
def test_learns_words(kind: str) -> None:
    tokenizer = trained(kind)
    assert len(tokenizer.encode("the model")) <= 2
    assert tokenizer.vocab_size <= 400


def segmentations(word: str, scores: dict[str, float]) -> Iterator[list[str]]:
    if not word:
        yield []
    for end in range(1, len(word) + 1):
        if word[:end] in scores:
            yield from ([word[:end], *rest] for rest in segmentations(word[end:], scores))


def test_expected_counts_against_enumeration() -> None:
    weights = {"a": 0.3, "b": 0.2, "c": 0.1, "ab": 0.15, "bc": 0.1, "abc": 0.1, "ba": 0.05}
    scores = {piece: math.log(weight) for piece, weight in weights.items()}
    words = [("abcab", 3), ("ba", 2), ("cabba", 1)]
    expected = dict.fromkeys(scores, 0.0)
    for word, count in words:
        cuts = list(segmentations(word, scores))
        chances = [math.exp(sum(scores[piece] for piece in cut)) for cut in cuts]
        for cut, chance in zip(cuts, chances, strict=True):
            for piece in cut:
                expected[piece] += count * chance / sum(chances)
    assert _expect(words, scores) == pytest.approx(expected)
    best = max(
        sum(scores[piece] for piece in cut)
        for cut in segmentations("abc", scores)
        if cut != ["abc"]
    )
    assert _without("abc", scores) == pytest.approx(best)


def test_unigram_keeps_the_alphabet_and_what_explains_most() -> None:
    words = {"ababab": 100, "abc": 50, "c": 5}
    assert set(train_unigram(words, ["a", "b", "c"], 5)) == {"a", "b", "c", "ababab", "abc"}
    assert set(train_unigram(words, ["a", "b", "c"], 4)) == {"a", "b", "c", "ababab"}
    assert train_unigram({}, ["a"], 1) == {"a": 0.0}


def corpus(folder: Path) -> str:
    import json

    lines = [json.dumps({"text": text}) for text in CORPUS]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "c.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_command(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["tokenizer", "train", "--input", corpus(tmp_path), "--type", kind]
    command += ["--vocab-size", "300", "--output", str(tmp_path / "tok")]
    assert main(command) == 0
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer.vocab_size <= 300
    assert (tmp_path / "tok" / "tokenizer.json").is_file()
    before = (tmp_path / "tok" / "artifact.json").stat().st_mtime_ns
    assert main(command) == 0
    assert "skipped" in capfd.readouterr().err
    assert (tmp_path / "tok" / "artifact.json").stat().st_mtime_ns == before
    assert main(["tokenizer", "inspect", "the [model]", "--tokenizer", str(tmp_path / "tok")]) == 0
    shown = capfd.readouterr().out
    assert tokenizer.piece(tokenizer.encode("the")[0]) in shown
    assert "of 11 bytes" in shown


def test_inspect_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import json

    trained("bpe").save(tmp_path / "tok")
    assert main(["tokenizer", "inspect", "aé", "--tokenizer", str(tmp_path / "tok"), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert b"".join(bytes.fromhex(t["bytes"]) for t in found["tokens"]).decode() == "aé"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--vocab-size", "100"], 2, "Nearest: 257"),
        (["--type", "bpe2"], 2, "must be one of"),
        (["--input", "nowhere.jsonl"], 3, "no such file"),
        (["--json-keys", "body"], 3, "missing key"),
        (["--vocab-size", "5000"], 0, "too small"),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenizer", "train", "--input", corpus(tmp_path), "--output", str(tmp_path / "tok")]
    if "--input" in arguments:
        command = command[:2] + command[4:]
    assert main([*command, *arguments]) == code
    assert words in capfd.readouterr().err
    assert (tmp_path / "tok").exists() == (code == 0)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_lines_are_left_out_and_counted(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(corpus(tmp_path))
    command = ["tokenizer", "train", "--type", kind, "--vocab-size", "300", "--input", str(path)]
    assert main([*command, "--output", str(tmp_path / "clean")]) == 0
    path.write_text("{broken\n" + path.read_text() + '{"other": 1}\n{broken too\n')
    assert main([*command, "--output", str(tmp_path / "tok")]) == 3
    assert "--on-bad-line skip" in capfd.readouterr().err  # the way out that the next line takes
    assert main([*command, "--output", str(tmp_path / "tok"), "--on-bad-line", "skip"]) == 0
    assert "3 records were left out: 2 invalid JSON, 1 missing key" in capfd.readouterr().err
    clean, skipped = (load_tokenizer(tmp_path / name) for name in ("clean", "tok"))
    assert clean.fingerprint == skipped.fingerprint


def test_empty_corpus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    command = ["tokenizer", "train", "--input", str(tmp_path / "c.jsonl")]
    assert main([*command, "--output", str(tmp_path / "tok")]) == 3
    assert "no text" in capfd.readouterr().err


def test_importing_tokenizers_is_light() -> None:
    heavy = ("torch", "transformers", "nltk", "sentencepiece", "tokenizers", "tiktoken")
    probe = f"import mtk.tokenizers, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
