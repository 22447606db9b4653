"""Detokenisers, windows and readers: golden values and brute force, no model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mtk.errors import DataError
from mtk.evaluation.detokenizers import choose, detokenize
from mtk.evaluation.documents import read_documents
from mtk.evaluation.windows import windows

WIKITEXT = (
    " \n = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre "
    'actor . He had a guest @-@ starring role in 1 @,@ 000 shows ( 3 @.@ 5 % ) ; the " best " '
    "ones : see [ 1 ] . \n = = Career = = \n It 's the writers ' N choice ! \n"
)
DETOKENISED = (
    "\n= Robert Boulter =\n\nRobert Boulter is an English film, television and theatre actor. He "
    'had a guest-starring role in 1,000 shows (3.5 %); the "best" ones: see [1].\n== Career ==\n'
    "It's the writers' 1 choice!\n"
)


def test_golden_wikitext() -> None:
    assert detokenize(WIKITEXT, "wikitext") == DETOKENISED
    assert len(WIKITEXT.strip().split(" ")) == 63


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("he 's $ N and # N , N left", "he's $1 and #1 ,1 left"),
        ("they do n't \n know", "they don't\nknow"),
    ],
)
def test_ptb(text: str, expected: str) -> None:
    assert detokenize(text, "ptb") == expected


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("data/wiki.test.tokens", "wikitext"),
        ("wiki/ptb.txt", "ptb"),
        ("lambada_test.jsonl", "none"),
        ("book.txt", "none"),
    ],
)
def test_choice_by_path(path: str, kind: str) -> None:
    assert choose(path) == kind


@pytest.mark.parametrize(
    ("length", "overlap"),
    [
        (length, overlap)
        for length in (1, 2, 5, 8)
        for overlap in (None, 1, 2, 3, 5)
        if overlap is None or overlap <= length
    ],
)
@pytest.mark.parametrize("targets", [1, 2, 4, 5, 6, 7, 8, 9, 16, 17, 40])
def test_windows_are_those_of_the_formula(length: int, overlap: int | None, targets: int) -> None:
    """Against a direct reading of Megatron's definition, window by window."""
    step = length if overlap is None else overlap
    count = max(math.ceil(max(targets - step, 0) / step) + 1, 1)
    expected = []
    for i in range(count):
        start = i * step
        real = [start + p < targets for p in range(length)]
        counted = [real[p] and (i == 0 or p >= length - step) for p in range(length)]
        if any(counted):
            expected.append((start, [start + p for p in range(length) if counted[p]]))
    found = [
        (w.start, list(range(w.start + w.first, w.start + w.length)))
        for w in windows(targets, length, overlap)
    ]
    assert found == expected
    assert [t for _, scored in found for t in scored] == list(range(targets))


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    found = read_documents(path, "text")
    assert [d.text for d in found] == ["one", "two"]
    assert [d.label for d in found] == ["a.jsonl:1", "a.jsonl:3"]
    plain = tmp_path / "b.txt"
    plain.write_bytes(b"one\r\ntwo\n")
    assert [d.text for d in read_documents(plain, "text")] == ["one\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n \n", "is empty"),
        ("a.txt", b"good \xff bad", "byte 5 is 0xff"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}\n', r"a\.jsonl:1 has no field 'text' \(it has: content"),
        ("a.jsonl", b'["x"]\n', "JSON list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800 y"}', r"a\.jsonl:2.*lone surrogate"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.jsonl", b'{"text": 3}\n', "not a text"),
        ("a.jsonl", b'{"text": " "}\n', "empty"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_documents(path, "text")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("between", [b"\n", b"\r\n", b"\n\n", b"\r"])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_ends_of_lines_and_files_do_not_matter(
    start: bytes, between: bytes, end: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(start + b'{"text": "one\\r\\ntwo"}' + between + b'{"text": "x"}' + end)
    assert [d.text for d in read_documents(path, "text")] == ["one\r\ntwo", "x"]
