"""Input at its worst: endless lines, bombs, odd bytes; and what JSON readers disagree on."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mtk.cli.main import main
from mtk.data import indexed_dataset, records, sources
from mtk.data.lines import Overlong
from mtk.data.records import RecordError, parse_record
from mtk.data.sources import read_chunks
from mtk.errors import ConfigError, DataError
from stages import preprocess
from tests.preprocess.corpora import QUIET, command, config, documents, jsonl, tokenizer_in


def slowly(raw: bytes, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(records, "quick_json", None)
        return outcome(raw, keys)


def outcome(raw: bytes, keys: tuple[str, ...]) -> Any:
    try:
        return parse_record(raw, keys, plain=False)
    except RecordError as error:
        return error.reason, error.detail, error.byte


ODD = [
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "n": NaN, "m": [Infinity, -Infinity]}',
    b'{"text": "a", "n": 123456789012345678901234567890}',
    b'{"text": "a", "n": 1e999}',
    b'{"text": "a", "n": ' + b"9" * 4301 + b"}",
    b'{"text": "a", "n": ' + b"9" * 400 + b"}",
    b'{"text": "a", "n": 1.' + b"9" * 5000 + b"}",
    b'{"text": "a", "n": 01}',
    b'{"text": "a", "n": -}',
    b'{"text": "a",}',
    b'{"text": "a\\u0000b\\ud83d\\ude00"}',
    b'{"text": "\\ud800"}',
    b'{"text": "ok", "other": "\\ud800"}',
    b'{"te\\u0078t": "escaped name"}',
    b'{"text": "\\x41"}',
    b'{"text": "a\x00b"}',
    b'{"text": "\x7f\xc2\x80"}',
    b'\xef\xbb\xbf{"text": "a"}',
    b'\x0c{"text": "a"}',
    b' \t{"text": "a"} \r\n',
    b'{"text": "a"}\x1a',
    b'{"text": "a"}\x00',
    b'{"text": ["a", "b"]}',
    b'{"text": ["a", 1]}',
    b'{"text": null}',
    b'"text"',
    b"[]",
    b"",
    '{"text": "a"}'.encode("utf-16"),
]


@pytest.mark.parametrize("raw", ODD, ids=range(len(ODD)))
def test_the_quick_reader_agrees_with_the_exact_one(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert records.quick_json is not None
    assert outcome(raw, ("text",)) == slowly(raw, ("text",), monkeypatch)


def test_they_agree_on_mutations(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    base = '{"text": "né\\n\\u00e9 \U0001f389", "n": [1.5e3, -0, {"a": true}], "t": ["x"]}'.encode()
    taken = 0
    for _ in range(4000):
        raw = bytearray(base)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            kind = rng.randrange(3)
            if kind == 0:
                raw[at] = rng.choice(b'"\\{}[]:,0123456789eE+-. \t\n\x00\x80\xffutn')
            elif kind == 1:
                del raw[at]
            else:
                raw[at:at] = raw[at : at + rng.randrange(6)]
        found = outcome(bytes(raw), ("text", "t"))
        assert found == slowly(bytes(raw), ("text", "t"), monkeypatch), bytes(raw)
        taken += isinstance(found, list)
    assert 300 < taken < 3700


def test_a_line_of_64_mib(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    unit = " a long line of words"
    text = unit * (3 << 20) + " end"
    assert len(text) > 62 << 20
    jsonl(tmp_path / "c.jsonl", [{"text": "before"}, {"text": text}, {"text": "after"}])
    preprocess.run(config(tmp_path), QUIET)
    before, long, after = (d[0] for d in documents(tmp_path / "out/P_text_document"))
    assert (before, after) == (tokenizer.encode("before"), tokenizer.encode("after"))
    assert long == tokenizer.encode(unit) * (3 << 20) + tokenizer.encode(" end")


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".txt", ".txt.gz"])
def test_a_line_beyond_the_limit_is_a_bad_record(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [b'{"text": "one"}', b'{"text": "' + b"x" * (3 << 20) + b'"}', b'{"text": "two"}']
    data = b"\n".join(lines)
    path = tmp_path / f"c{kind}"
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    more = ["--input", str(path), "--max-record-mb", "1", "--text-documents", "line"]
    assert main(command(tmp_path, *more)) == 3
    message = " ".join(capfd.readouterr().err.split())
    size = f"{len(lines[1]) + 1:,}"
    assert f"line 2 (byte {len(lines[0]) + 1}): too long: it has {size} bytes" in message
    assert "--max-record-mb allows 1,048,576" in message
    assert main(command(tmp_path, *more, "--on-bad-line", "skip")) == 0
    assert len(documents(tmp_path / "out/P_text_document")) == 2
    assert main(command(tmp_path, *more[:2], "--text-documents", "line", "--force")) == 0
    assert len(documents(tmp_path / "out/P_text_document")) == 3


def test_a_paragraph_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(b"one\n\n" + b"0123456789\n" * 10 + b"\ntwo\n" + b"x" * 200 + b"\n\nthree")
    [chunk] = read_chunks([path], ["text"], "blank-line", limit=50)
    assert [bytes(record) for record in chunk.records] == [b"one", b"", b"", b"three"]
    sizes = [record.size for record in chunk.records if isinstance(record, Overlong)]
    assert sizes == [110, 205]
    assert chunk.numbers == (1, 3, 14, 17)


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A gigabyte without a line end, in 1 MB."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as stream:
        for _ in range(1 << 10):
            stream.write(b" " * (1 << 20))
        stream.write(b'\n{"text": "after"}\n')
    tracemalloc.start()
    found = [r for c in read_chunks([path], ["text"], "file", limit=8 << 20) for r in c.records]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(found[0], Overlong)
    assert (found[0].size, found[1]) == ((1 << 30) + 1, b'{"text": "after"}\n')
    assert peak < 40 << 20, f"{peak >> 20} MiB"


def test_lines_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 10)
    [chunk] = read_chunks([path], ["text"], "file", limit=10)
    assert [type(record) is Overlong for record in chunk.records] == [False, True, False]
    assert chunk.starts == (0, 11, 23)


def test_nul_bytes_mark_and_crlf(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    records_ = [b'{"text": "a\\u0000b"}', b'{"text": "\\ufeffc"}', b'{"text": "d\\r\\ne"}']
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(records_))
    preprocess.run(config(tmp_path), QUIET)
    expected = [[tokenizer.encode(text)] for text in ("a\0b", "\ufeffc", "d\r\ne")]
    assert documents(tmp_path / "out/P_text_document") == expected


def test_a_document_that_the_format_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(indexed_dataset, "_LONGEST", 10)
    jsonl(tmp_path / "c.jsonl", [{"text": "short"}, {"text": "zq" * 10}])
    assert main(command(tmp_path)) == 3
    message = " ".join(capfd.readouterr().err.split())
    assert "a sequence of 20 tokens is longer than the 10 that .idx can record" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cut_gzip_file_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = gzip.compress(b'{"text": "a document"}\n' * 20_000)
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    more = ["--input", str(path), "--on-bad-line", "skip"]
    assert main(command(tmp_path, *more)) == 3
    assert "the stream is broken" in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_few_bad_lines_among_many(tmp_path: Path) -> None:
    """1,200 of 12 kinds among 120,000: exact counts by kind, at the right lines."""
    kinds = [
        (b"", "empty line"), (b"{", "invalid JSON"), (b"[]", "not an object"),
        (b'"x"', "not an object"), (b'{"t": 1}', "missing key"), (b'{"text": 1}', "not text"),
        (b'{"text": null}', "not text"), (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"), (b'{"text": "a\tb"}', "invalid JSON"),
        (b'{"text": "a"} x', "invalid JSON"),
        (b'{"text": "' + b"y" * 1_048_600 + b'"}', "too long"),
    ]  # fmt: skip
    expected = []
    with (tmp_path / "c.jsonl").open("wb") as stream:
        for number in range(1, 120_001):
            bad = kinds[number // 100 % 12] if number % 100 == 0 and number < 24_000 else None
            bad = kinds[number // 100 % 11] if number % 100 == 0 and number >= 24_000 else bad
            stream.write((bad[0] if bad else b'{"text": "document %d"}' % number) + b"\n")
            expected += [(number, bad[1])] if bad else []
    more = ("--on-bad-line", "skip", "--max-record-mb", "1")
    assert main(command(tmp_path, *more)) == 0
    report = (tmp_path / "out/P.bad_lines.jsonl").read_text().splitlines()
    found = [(entry["number"], entry["reason"]) for entry in map(json.loads, report)]
    assert found == expected
    assert len(expected) == 1200
    assert len(documents(tmp_path / "out/P_text_document")) == 118_800


def test_option_rule(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Nearest: 1"):
        config(tmp_path, max_record_mb=0)
    assert config(tmp_path).max_record_mb << 20 == sources.LARGEST_TEXT


def test_sentences_that_keep_their_newlines_are_the_text() -> None:
    from mtk.tokenizers.punkt import BLOCK, PunktSplitter, learn_parameters, write_parameters
    from tests.tokenizers.test_engines import mixtures

    texts = [*mixtures(200, seed=9), "Hello. " * (BLOCK // 7 + 9), "", "\n\n", " a. \n\n b! "]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtk.tokenizers.punkt.BLOCK", 1000)
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "p.json")
            write_parameters(learn_parameters(iter(texts[:50]), "english"), path)
            splitter = PunktSplitter(str(path), True)
            assert ["".join(splitter.split(text)) for text in texts] == texts
            without = PunktSplitter(str(path), False)
            plain = without.plain
            for text in texts:
                blocks = [text[i : i + 1000] for i in range(0, len(text), 1000)]
                expected = [s for block in blocks for s in plain.tokenize(block)]
                assert without.split(text) == expected


def test_nothing_is_left_of_a_broken_array(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('[{"text": "a"}, {"text": "b"')
    with pytest.raises(DataError, match="byte"):
        preprocess.run(config(tmp_path, input=(str(tmp_path / "c.json"),)), QUIET)
    assert list((tmp_path / "out").iterdir()) == []
