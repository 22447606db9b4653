"""RACE, MNLI and QQP files: golden samples, and every fault named with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtk.config import make
from mtk.config.heads import TASKS
from mtk.config.tokenizer import TokenizerConfig
from mtk.errors import ConfigError, DataError
from mtk.evaluation.classification import (
    ClassificationData,
    LabelledText,
    clean_text,
    pair_sequence,
)
from mtk.evaluation.glue import glue_name, read_mnli, read_qqp
from mtk.evaluation.race import race_name, read_race
from mtk.tokenizers import Tokenizer
from mtk.tokenizers.build import build_tokenizer

# [PAD] is not 0, so that types of padding show.
PIECES = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", *"abcdefq._", "fox", "dog"]
CLS, SEP, PAD, A, B, C, D, E, Q, DOT = (
    PIECES.index(piece) for piece in ("[CLS]", "[SEP]", "[PAD]", *"abcdeq.")
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    config = make(TokenizerConfig, tokenizer_type="BertWordPieceLowerCase", vocab_file=str(path))
    return build_tokenizer(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\r\n  c\t d", "a b c d"),
        ("one . two . . . three .", "one. two. .. three ."),
        (" . x", ". x"),
        ("a . . . . b", "a. ... b"),
    ],
)
def test_clean_text(text: str, expected: str) -> None:
    assert clean_text(text) == expected


@pytest.mark.parametrize(
    ("length", "ids", "types", "mask"),
    [
        (
            10,
            [CLS, A, B, SEP, C, D, E, SEP, PAD, PAD],
            [0, 0, 0, 0, 1, 1, 1, 1, PAD, PAD],
            [1] * 8 + [0] * 2,
        ),
        (8, [CLS, A, B, SEP, C, D, E, SEP], [0, 0, 0, 0, 1, 1, 1, 1], [1] * 8),
        (7, [CLS, A, B, SEP, C, D, SEP], [0, 0, 0, 0, 1, 1, 1], [1] * 7),
        (5, [CLS, A, B, SEP, SEP], [0, 0, 0, 0, 1], [1] * 5),
        (4, [CLS, A, B, SEP], [0, 0, 0, 1], [1] * 4),
    ],
)
def test_pair_sequence(length: int, ids: list[int], types: list[int], mask: list[int]) -> None:
    found = pair_sequence([A, B], [C, D, E], length, cls=CLS, sep=SEP, pad=PAD)
    assert found == (ids, types, mask)


def race_file(folder: Path, name: str, *records: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")


GOOD = {
    "article": "a b .\nc",
    "questions": ["q _ d _ ?", "q"],
    "options": [["a", "b", "c", "d"], ["e", "f", "a b", "c"]],
    "answers": ["B", "D"],
}


def test_race(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "RACE" / "dev" / "middle"
    race_file(folder, "2.txt", GOOD, "", GOOD)
    race_file(folder, "1.txt", GOOD | {"article": "f", "answers": ["A", "C"]})
    race_file(folder, "notes.md", "nothing")
    texts = read_race(folder)
    assert [t.uid for t in texts] == list(range(6))
    assert [t.label for t in texts] == [0, 2, 1, 3, 1, 3]
    assert texts[0].origin.endswith("1.txt:1, question 1")
    assert texts[5].origin.endswith("2.txt:3, question 2")
    assert texts[2].pairs[1] == ("q b d b ?", "a b. c")
    assert texts[3].pairs[2] == ("q a b", "a b. c")
    data = ClassificationData(TASKS["RACE"], texts, tokenizer, 12, race_name(folder))
    assert (len(data), data.name, data.task.classes, data.task.outputs) == (6, "dev-middle", 4, 1)
    sample = data[3]
    assert sample.text.shape == sample.types.shape == sample.mask.shape == (4, 12)
    assert sample.text[2].tolist() == [CLS, Q, A, B, SEP, A, B, DOT, C, SEP, PAD, PAD]
    assert sample.types[2].tolist() == [0] * 5 + [1] * 5 + [PAD] * 2
    assert sample.mask[2].tolist() == [1] * 10 + [0] * 2
    assert (sample.label, sample.uid) == (3, 3)
    with pytest.raises(IndexError):
        data[6]


def test_race_keeps_128_tokens_of_question_and_answer(tokenizer: Tokenizer) -> None:
    text = LabelledText(0, 1, tuple((" ".join(["a"] * 200), "b") for _ in range(4)), "x")
    race = ClassificationData(TASKS["RACE"], [text], tokenizer, 200)[0].text
    assert race[0].tolist()[:132] == [CLS] + [A] * 128 + [SEP, B, SEP]
    glue = ClassificationData(
        TASKS["QQP"], [LabelledText(0, 1, text.pairs[:1], "x")], tokenizer, 200
    )
    assert glue[0].text[0].tolist() == [CLS] + [A] * 198 + [SEP]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"article": ', r"1\.txt:1 is not JSON"),
        ("[1]", r"1\.txt:1 is a JSON list"),
        (GOOD | {"article": " "}, r"1\.txt:1: the field 'article'"),
        (GOOD | {"questions": "q"}, "'questions' is missing, or not a list"),
        (GOOD | {"answers": ["A"]}, "2 questions, 2 lists of options and 1 answers"),
        (GOOD | {"answers": ["A", "E"]}, r"1\.txt:1, question 2: the answer is 'E'"),
        (GOOD | {"answers": ["A", 1]}, "question 2: the answer is 1"),
        (GOOD | {"answers": ["AB", "A"]}, "question 1: the answer is 'AB'"),
        (GOOD | {"questions": ["q", 3]}, "question 2 is not a text"),
        (GOOD | {"options": [["a", "b", "c"], GOOD["options"][1]]}, "question 1: the options"),
        (GOOD | {"options": [[1, 2, 3, 4], GOOD["options"][1]]}, "are not 4 texts"),
    ],
)
def test_bad_race(record: Any, message: str, tmp_path: Path) -> None:
    race_file(tmp_path / "data", "1.txt", record)
    with pytest.raises(DataError, match=message):
        read_race(tmp_path / "data")


def test_no_race(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_race(tmp_path / "none")
    with pytest.raises(DataError, match=r"no \*\.txt file"):
        read_race(tmp_path)


def mnli_row(uid: str, first: str, second: str, *rest: str) -> str:
    return "\t".join([uid, "p", "i", "g", "s1", "s2", "s3", "s4", first, second, *rest])


MNLI_HEAD = mnli_row("index", "sentence1", "sentence2", "label1", "gold_label")
MNLI_TEST_HEAD = mnli_row("index", "sentence1", "sentence2")


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_mnli(end: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        mnli_row("7", " a  b . c ", 'd "e', "neutral", "entailment"),
        mnli_row("31", "a", "b", "entailment", "contradiction "),
        mnli_row("2", "a", "b", "entailment", "neutral"),
    ]
    texts = read_mnli(write(tmp_path / "dev_matched.tsv", MNLI_HEAD, *rows, end=end))
    assert [(t.uid, t.label) for t in texts] == [(7, 1), (31, 0), (2, 2)]
    assert texts[0].pairs == (("a b. c", 'd "e'),)
    assert texts[2].origin.endswith("dev_matched.tsv:4")
    sample = ClassificationData(TASKS["MNLI"], texts, tokenizer, 8)[1]
    assert sample.text.tolist() == [[CLS, A, SEP, B, SEP, PAD, PAD, PAD]]
    assert sample.types.tolist() == [[0, 0, 0, 1, 1, PAD, PAD, PAD]]
    assert TASKS["MNLI"].classes == TASKS["MNLI"].outputs == 3


def test_mnli_test_file_has_ten_columns(tmp_path: Path) -> None:
    rows = [mnli_row("0", "a", "b"), mnli_row("1", "c", "d")]
    path = write(tmp_path / "test.tsv", MNLI_TEST_HEAD, *rows)
    assert [t.label for t in read_mnli(path)] == [0, 0]
    cut = path.read_bytes()[:-1]
    path.write_bytes(cut)
    assert len(read_mnli(path)) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([MNLI_HEAD], "no sample besides its header"),
        (["a\tb"], r"x\.tsv:1 has 2 columns"),
        ([MNLI_HEAD, mnli_row("1", "a", "b", "x", "maybe")], r"x\.tsv:2: the label is 'maybe'"),
        ([MNLI_HEAD, mnli_row("1", "a", " ", "x", "neutral")], "sentence 2 is empty"),
        ([MNLI_HEAD, mnli_row("1", "", "b", "x", "neutral")], "sentence 1 is empty"),
        ([MNLI_HEAD, mnli_row("one", "a", "b", "x", "neutral")], "uid is 'one'"),
        ([MNLI_HEAD, mnli_row("-1", "a", "b", "x", "neutral")], "uid is '-1'"),
        ([MNLI_HEAD, mnli_row("1", "a", "b")], "10 columns, too few to hold a label"),
        ([MNLI_TEST_HEAD, "1\ta"], "2 columns, too few to hold a sentence"),
    ],
)
def test_bad_mnli(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_mnli(write(tmp_path / "x.tsv", *lines))


QQP_HEAD = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"


def test_qqp(tmp_path: Path) -> None:
    warnings: list[str] = []
    lines = [
        QQP_HEAD,
        "5\t1\t2\ta  b\tc . d\t1",
        "6\t1\t2\ta",  # too short
        "7\t1\t2\t \tb\t0",  # empty question
        "8\t1\t2\ta\tb\t0\tx",  # too long
        "",
        "9\t1\t2\ta\tb\t0",
    ]
    texts = read_qqp(write(tmp_path / "train.tsv", *lines), warnings.append)
    assert [(t.uid, t.label) for t in texts] == [(5, 1), (9, 0)]
    assert texts[0].pairs == (("a b", "c. d"),)
    assert len(warnings) == 1 and "3 rows" in warnings[0] and "train.tsv:3" in warnings[0]
    path = write(tmp_path / "test.tsv", "id\tquestion1\tquestion2", "0\ta\tb", "1\tc\td")
    assert [(t.uid, t.label, t.pairs) for t in read_qqp(path, warnings.append)] == [
        (0, 0, (("a", "b"),)),
        (1, 0, (("c", "d"),)),
    ]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a\tb"], r"x\.tsv:1 has 2 columns"),
        ([QQP_HEAD, "1\t1\t2\ta\tb\t2"], r"x\.tsv:2: the label is 2"),
        ([QQP_HEAD, "1\t1\t2\ta\tb\tyes"], "the label is 'yes'"),
        ([QQP_HEAD, "x\t1\t2\ta\tb\t1"], "the id is 'x'"),
        ([QQP_HEAD, "9" * 5000 + "\t1\t2\ta\tb\t1"], "whole number of up to 18 digits"),
        ([QQP_HEAD, "1\t1"], "no sample besides its header"),
        (["id\tquestion1\tquestion2", "1\ta"], r"x\.tsv:2: 2 columns instead of 3"),
        (["id\tquestion1\tquestion2", "1\t \tb"], "an empty question"),
    ],
)
def test_bad_qqp(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_qqp(write(tmp_path / "x.tsv", *lines), lambda text: None)


def test_names() -> None:
    assert race_name("/data/RACE/dev/middle/") == "dev-middle"
    assert glue_name("/data/MNLI/dev_matched.tsv", "MNLI") == "dev-matched"
    assert glue_name("QQP/test.tsv", "QQP") == "test"


def test_a_tokenizer_without_cls_is_refused(tokenizer: Tokenizer) -> None:
    from tests.convert.models import small_tokenizer

    with pytest.raises(ConfigError, match="has no CLS, SEP, padding token"):
        ClassificationData(TASKS["QQP"], [], small_tokenizer(), 8)
    with pytest.raises(ConfigError, match="Nearest: 4"):
        ClassificationData(TASKS["QQP"], [], tokenizer, 3)
