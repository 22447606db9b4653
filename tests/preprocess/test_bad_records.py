"""Every kind of bad record: the exact place under ``fail``, exact counts under ``skip``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtk.cli.main import main
from tests.preprocess.corpora import command, corpus, jsonl

GOOD = b'{"text": "fine"}'
DEEP = b'{"text": "x", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
# name -> (line, reason, byte inside the line)
BAD: dict[str, tuple[bytes, str, int]] = {
    "empty": (b"", "empty line", 0),
    "spaces": (b"  \t", "empty line", 0),
    "cut off": (b'{"text": "abc', "invalid JSON", 9),
    "not JSON": (b"hello world", "invalid JSON", 0),
    "single quotes": (b"{'text': 'a'}", "invalid JSON", 1),
    "two objects": (b'{"text": "a"} {"text": "b"}', "invalid JSON", 14),
    "missing comma": (b'{"text": "a" "b"}', "invalid JSON", 13),
    "raw tab inside": (b'{"text": "a\tb"}', "invalid JSON", 11),
    "after two-byte characters": ('{"é": "é", x}'.encode(), "invalid JSON", 13),
    "too deep": (DEEP, "invalid JSON", 0),
    "number too long": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "invalid JSON", 0),
    "array": (b'["text"]', "not an object", 0),
    "string": (b'"text"', "not an object", 0),
    "null": (b"null", "not an object", 0),
    "missing key": (b'{"Text": "a"}', "missing key", 0),
    "no keys": (b"{}", "missing key", 0),
    "null value": (b'{"text": null}', "not text", 0),
    "number value": (b'{"text": 5}', "not text", 0),
    "object value": (b'{"text": {"a": "b"}}', "not text", 0),
    "list with number": (b'{"text": ["a", 1]}', "not text", 0),
    "latin-1": (b'{"text": "caf\xe9"}', "invalid UTF-8", 13),
    "overlong": (b'{"text": "\xc0\xaf"}', "invalid UTF-8", 10),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8", 10),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate", 0),
    "low surrogate": (b'{"text": ["ok", "\\udc00"]}', "lone surrogate", 0),
}


def write(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("name", BAD)
def test_fail_names_the_place(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line, reason, inside = BAD[name]
    write(tmp_path / "c.jsonl", [GOOD, GOOD, line, GOOD, line])
    assert main(command(tmp_path)) == 3
    message = capfd.readouterr().err
    byte = 2 * (len(GOOD) + 1) + inside
    assert f"{tmp_path / 'c.jsonl'}, line 3 (byte {byte}): {reason}" in message
    assert "--on-bad-line skip" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_skip_equals_the_clean_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """12,500 bad lines of 25 kinds among 30,000: exact counts, and the clean file's bytes."""
    bad = [line for line, _, _ in BAD.values() if len(line) < 10_000]
    lines, expected = [], []
    for index in range(30_000):
        lines.append(b'{"text": "document %d"}' % index)
        if index % 5 < 2:
            which = (index // 5 * 2 + index % 5) % len(bad)
            lines.append(bad[which])
            expected.append((len(lines), which))
    write(tmp_path / "c.jsonl", lines)
    assert main(command(tmp_path, "--on-bad-line", "skip", "--json")) == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    metrics = events[-1]["metrics"]
    assert (
        (metrics["records"], metrics["bad_records"])
        == (len(lines), len(expected))
        == (
            42_000,
            12_000,
        )
    )
    assert sum(metrics["bad_by_reason"].values()) == 12_000
    report = (tmp_path / "out/P.bad_lines.jsonl").read_text().splitlines()
    assert len(report) == 10_000
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    named = [value for value in BAD.values() if len(value[0]) < 10_000]
    for text, (number, which) in zip(report, expected, strict=False):
        entry = json.loads(text)
        _, reason, inside = named[which]
        assert (entry["number"], entry["reason"]) == (number, reason)
        assert entry["byte"] == starts[number - 1] + inside

    clean = tmp_path / "clean"
    clean.mkdir()
    jsonl(clean / "c.jsonl", [{"text": f"document {index}"} for index in range(30_000)])
    assert main(command(clean)) == 0
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out/P_text_document.{suffix}").read_bytes() == (
            clean / f"out/P_text_document.{suffix}"
        ).read_bytes()


def test_a_bad_record_is_left_out_of_every_key(tmp_path: Path) -> None:
    records: list[object] = [
        {"text": "a", "title": "A"},
        {"text": "b"},
        {"text": "c", "title": "C"},
    ]
    jsonl(tmp_path / "c.jsonl", records)
    more = ("--json-keys", "text", "title", "--on-bad-line", "skip")
    assert main(command(tmp_path, *more)) == 0
    from tests.preprocess.corpora import documents

    assert len(documents(tmp_path / "out/P_text_document")) == 2
    assert len(documents(tmp_path / "out/P_title_document")) == 2


@pytest.mark.parametrize(("fraction", "code"), [("0.5", 0), ("0.49", 3), ("0", 3), ("1", 0)])
def test_max_bad_fraction(fraction: str, code: int, tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl", [GOOD, b"{", b"{", GOOD])
    more = ("--on-bad-line", "skip", "--max-bad-fraction", fraction)
    assert main(command(tmp_path, *more)) == code
    assert bool(list((tmp_path / "out").iterdir())) == (code == 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no records"),
        (b'{"text": ""}\n{"text": []}\n', "no token"),
        (b"{\n{\n", "all 2 records are bad"),
    ],
)
def test_nothing_to_train_on(
    content: bytes, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    assert main(command(tmp_path, "--on-bad-line", "skip")) == 3
    assert words in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_the_tokenizer_refuses_is_a_bad_record(tmp_path: Path) -> None:
    jsonl(tmp_path / "c.jsonl", [{"text": "1 2"}, {"text": "1 x"}, {"text": "3"}, {"text": "99"}])
    base = ["preprocess", "--input", str(tmp_path / "c.jsonl"), "--workers", "1"]
    base += ["--output-prefix", str(tmp_path / "P"), "--tokenizer-type", "NullTokenizer"]
    base += ["--vocab-size", "9"]
    assert main(base) == 3
    assert main([*base, "--on-bad-line", "skip", "--append-eod"]) == 0
    from tests.preprocess.corpora import documents

    assert documents(tmp_path / "P_text_document") == [[[1, 2, 9]], [[3, 9]]]
    report = [json.loads(x) for x in (tmp_path / "P.bad_lines.jsonl").read_text().splitlines()]
    assert [(entry["number"], entry["reason"]) for entry in report] == [
        (2, "not tokenizable"),
        (4, "not tokenizable"),
    ]


def test_missing_inputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path)
    for given, words in (
        ("nowhere.jsonl", "no such file"),
        ("*.nothing", "no such file"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "tok" / "mtk_tokenizer.xml"), "no such file"),
    ):
        assert main(command(tmp_path, "--input", given)) == 3
        assert words in capfd.readouterr().err
    (tmp_path / "c.csv").write_text("a,b")
    assert main(command(tmp_path, "--input", str(tmp_path / "c.csv"))) == 3
    assert ".csv is not known" in capfd.readouterr().err
    assert main(command(tmp_path, "--tokenizer-model", str(tmp_path / "none"))) in (2, 3)
    assert main(command(tmp_path, "--no-such-option")) == 2
