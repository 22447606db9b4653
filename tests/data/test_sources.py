"""Formats, compression, globs, and streams that break in the middle."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mtk.data import json_array, sources
from mtk.data.records import read_texts
from mtk.data.sources import expand_inputs, file_format, read_chunks
from mtk.errors import DataError

RECORDS = [{"text": f"text {i} é"} for i in range(25)]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def zst(data: bytes) -> bytes:
    compressed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return compressed


def array(**layout: object) -> bytes:
    return json.dumps(RECORDS, ensure_ascii=False, **layout).encode()  # type: ignore[arg-type]


FORMATS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "jsonl": ("c.jsonl", lambda: LINES),
    "no newline at the end": ("c.jsonl", lambda: LINES[:-1]),
    "windows": ("c.jsonl", lambda: LINES.replace(b"\n", b"\r\n")),
    "byte order mark": ("c.jsonl", lambda: b"\xef\xbb\xbf" + LINES),
    "lines named json": ("c.json", lambda: LINES),
    "array": ("c.json", array),
    "indented array": ("c.json", lambda: b"\xef\xbb\xbf\n " + array(indent=2) + b"\n\n"),
    "gz": ("c.jsonl.gz", lambda: gzip.compress(LINES)),
    "gz of two parts": (
        "c.jsonl.gz",
        lambda: gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    ),
    "array gz": ("c.json.gz", lambda: gzip.compress(array())),
    "zst": ("c.jsonl.zst", lambda: zst(LINES)),
    "zst of two frames": ("c.jsonl.zst", lambda: zst(LINES[:100]) + zst(LINES[100:])),
    "capitals": ("C.JSONL", lambda: LINES),
    "dots": ("a.b.c.jsonl", lambda: LINES),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("small", [False, True])
def test_formats(name: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:  # every buffer boundary falls inside a record
        monkeypatch.setattr(json_array, "BLOCK", 7)
        monkeypatch.setattr(sources, "CHUNK_BYTES", 60)
    file, make = FORMATS[name]
    path = tmp_path / file
    path.write_bytes(make())
    assert list(read_texts([path], ["text"], "file")) == TEXTS
    chunks = list(read_chunks([path], ["text"], "file"))
    assert sum(chunk.done for chunk in chunks) == path.stat().st_size
    numbers = [number for chunk in chunks for number in chunk.numbers]
    assert numbers == list(range(1, 26))
    if file.endswith((".json", ".jsonl")):
        data = path.read_bytes()
        for chunk in chunks:
            for start, record in zip(chunk.starts, chunk.records, strict=True):
                assert data[start:].removeprefix(b"\xef\xbb\xbf").startswith(record)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "c.parquet"
    table = pyarrow.table({"text": [*TEXTS, None], "n": range(26), "s": [["a", "b"]] * 26})
    parquet.write_table(table, path)
    assert list(read_texts([path], ["text"], "file", skip_bad=True)) == TEXTS
    assert next(read_texts([path], ["s"], "file")) == "a b"
    with pytest.raises(DataError, match=r"row 26: not text: 'text' is a null"):
        list(read_texts([path], ["text"], "file"))
    with pytest.raises(DataError, match="no column 'body'; it has text, n, s"):
        list(read_texts([path], ["body"], "file"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable parquet"):
        list(read_texts([path], ["text"], "file"))


TEXT = "one\ntwo\r\n\n \nthree\n\n\nfour  \nfive"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("file", [TEXT]),
        ("line", ["one", "two", "three", "four  ", "five"]),
        ("blank-line", ["one\ntwo", "three", "four  \nfive"]),
    ],
)
def test_plain_text(mode: sources.TextDocuments, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(TEXT.encode())
    assert list(read_texts([path], ["text"], mode)) == expected
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert list(read_texts([tmp_path / "d.txt.gz"], ["text"], mode)) == expected
    path.write_bytes(b"ok\n\nab\xff")
    with pytest.raises(DataError, match=r"\(byte 6\): invalid UTF-8"):
        list(read_texts([path], ["text"], mode))


def test_a_text_too_large_for_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_TEXT", 10)
    (tmp_path / "c.txt").write_text("x" * 11)
    with pytest.raises(DataError, match="--text-documents"):
        list(read_texts([tmp_path / "c.txt"], ["text"], "file"))
    assert list(read_texts([tmp_path / "c.txt"], ["text"], "line")) == ["x" * 11]


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("c.jsonl.gz", gzip.compress(LINES * 50)[:-4], "line 1250"),
        ("c.jsonl.gz", gzip.compress(LINES)[:40], "the stream is broken"),
        ("c.jsonl.gz", LINES, "the stream is broken"),
        ("c.jsonl.gz", gzip.compress(LINES)[:-8] + b"\0" * 8, "CRC"),
        ("c.jsonl.gz", gzip.compress(LINES) + b"garbage", "the stream is broken"),
        ("c.jsonl.zst", LINES, "the stream is broken"),
        ("c.txt.gz", LINES, "the stream is broken"),
    ],
    ids=["cut", "begun", "plain", "checksum", "trailing", "zst", "text"],
)
def test_broken_streams_are_never_skipped(
    file: str, data: bytes, words: str, tmp_path: Path
) -> None:
    if file.endswith("zst"):
        pytest.importorskip("zstandard")
    path = tmp_path / file
    path.write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        list(read_texts([path], ["text"], "file", skip_bad=True))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"}', "byte 14: the array is not closed"),
        ('[{"text": "a"} {"text": "b"}]', "byte 15: expected ','"),
        ('[{"text": "a"},]', "byte 15: item 2"),
        ('[{"text": "é"}, {"text: 5}]', "byte 17: item 2"),
        ('[{"text": "a"}] x', "byte 16: text follows"),
        ('[{"text": "a"}, {"a" 5}' + " " * 100 + "]", "byte 16: item 2: Expecting ':'"),
        ("[" * 100_000, "nested too deep"),
    ],
)
@pytest.mark.parametrize("block", [5, 1 << 20])
def test_broken_arrays(
    content: str, words: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "BLOCK", block)
    path = tmp_path / "c.json"
    path.write_bytes(content.encode())
    with pytest.raises(DataError, match=r"c\.json, byte") as caught:
        list(read_texts([path], ["text"], "file", skip_bad=True))
    assert words in str(caught.value)


def test_items_of_an_array_are_records(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('[1, {"text": "a"}, 23, "x", {"text": null}, {"text": "b"}, 4]')
    assert list(read_texts([path], ["text"], "file", skip_bad=True)) == ["a", "b"]
    with pytest.raises(DataError, match=r"item 1 \(byte 1\): not an object"):
        list(read_texts([path], ["text"], "file"))


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    found = expand_inputs([f"{tmp_path}/*.jsonl"])
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "odd[1].jsonl"]
    found = expand_inputs([f"{tmp_path}/b.jsonl", f"{tmp_path}/**/*.jsonl"])
    assert [path.name for path in found] == ["b.jsonl", "a.jsonl", "c.jsonl", "odd[1].jsonl"]
    assert [p.name for p in expand_inputs([f"{tmp_path}/odd[1].jsonl"])] == ["odd[1].jsonl"]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in expand_inputs(["deep/*"])] == ["deep/c.jsonl"]


@pytest.mark.parametrize("name", ["c.csv", "c", "c.gz", "c.parquet.gz", "c.jsonl.bz2", "c.gz.gz"])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(DataError, match="is not known"):
        file_format(Path(name))


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("missing", [1, 3, 40])
def test_a_cut_zst_file_is_refused(frames: int, missing: int, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes((zst(LINES) * frames)[:-missing])
    with pytest.raises(DataError, match="ends inside a zstd frame"):
        list(read_texts([path], ["text"], "file", skip_bad=True))


def test_zst_frames_without_text(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    path.write_bytes(skippable + zst(LINES) + zst(b"") + zst(LINES) + skippable)
    assert list(read_texts([path], ["text"], "file")) == TEXTS * 2


@pytest.mark.parametrize(
    ("file", "content"),
    [("c.jsonl", b'{"text": }\n'), ("c.txt", b"abcdefgh\xff"), ("c.json", b'{"text": }')],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
def test_bytes_are_counted_with_the_byte_order_mark(
    file: str, content: bytes, mark: bytes, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_bytes(mark + content)
    place = len(mark) + content.index(b"\xff" if file == "c.txt" else b"}")
    with pytest.raises(DataError, match=f"byte {place}"):
        list(read_texts([path], ["text"], "file"))


def test_parquet_text_stored_as_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = ["h\u00e9".encode(), b"plain", b"not \xff text"]
    table = pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())})
    parquet.write_table(table, tmp_path / "c.parquet")
    read = read_texts([tmp_path / "c.parquet"], ["text"], "file", skip_bad=True)
    assert list(read) == ["h\u00e9", "plain"]
    with pytest.raises(DataError, match="row 3"):
        list(read_texts([tmp_path / "c.parquet"], ["text"], "file"))


def test_a_glob_does_not_match_the_outputs(tmp_path: Path) -> None:
    for name in ("a.jsonl", "P.bad_lines.jsonl", "P.punkt.json", "P.artifact.json", "Q.json"):
        (tmp_path / name).write_text("{}")
    found = expand_inputs([f"{tmp_path}/*.json*"], f"{tmp_path}/x/../P")
    assert [path.name for path in found] == ["Q.json", "a.jsonl"]
    # Named in full, a report is an input like any other.
    named = f"{tmp_path}/P.bad_lines.jsonl"
    assert [str(path) for path in expand_inputs([named], f"{tmp_path}/P")] == [named]
