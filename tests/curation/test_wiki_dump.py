"""Reading dumps: every packing, every place to begin again, every way to be broken."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from mtk.curation.wikipedia import dump as reading
from mtk.curation.wikipedia.dump import Place, read_pages
from mtk.curation.wikipedia.page import PageError, parse_page
from mtk.curation.wikipedia.site import read_site
from mtk.errors import DataError
from tests.curation.wiki_dumps import TAIL, Page, dump, head, many_pages

COUNT = 700
START = Place(0, 0, 0, (0, 0))


def multistream(data: bytes, pack: Callable[[bytes], bytes] = bz2.compress) -> bytes:
    """Head, a hundred pages a stream, tail: as the multistream dumps are made."""
    pages = data.split(b"</page>\n")
    streams = [pages[0][: pages[0].index(b"  <page>")], b""]
    pages[0] = pages[0].removeprefix(streams[0])
    for number, page in enumerate(pages[:-1]):
        if number and number % 100 == 0:
            streams.append(b"")
        streams[-1] += page + b"</page>\n"
    return b"".join(pack(stream) for stream in [*streams, pages[-1]])


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "bz2": bz2.compress,
    "multistream bz2": multistream,
    "gz": gzip.compress,
    "several gz": lambda data: multistream(data, gzip.compress),
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
    "several zst": lambda data: multistream(data, zstandard.ZstdCompressor().compress),
}


@pytest.fixture(scope="module")
def data() -> bytes:
    return dump(many_pages(COUNT))


def read(path: Path, place: Place = START) -> list[reading.PageChunk]:
    return list(read_pages([path], [read_site(path)], place))


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_every_page(packing: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.write_bytes(PACKINGS[packing](data))
    chunks = read(path)
    assert len(chunks) > 3
    pages = [(b, xml) for chunk in chunks for b, xml in zip(chunk.bytes, chunk.pages, strict=True)]
    assert len(pages) == COUNT
    assert all(data[start : start + len(xml)] == xml for start, xml in pages)
    assert sum(chunk.done for chunk in chunks) == path.stat().st_size
    assert [chunk.first for chunk in chunks if chunk.pages] == [
        1 + sum(len(earlier.pages) for earlier in chunks[:index])
        for index, chunk in enumerate(chunks)
        if chunk.pages
    ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_reading_begins_again_after_every_chunk(
    packing: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtk.curation.wikipedia.stream.PLAIN_BLOCK", 100_000)
    path = tmp_path / "d"
    path.write_bytes(PACKINGS[packing](data))
    chunks = read(path)
    for index, chunk in enumerate(chunks[:-1]):
        place = Place.from_json(chunk.after.to_json())
        again = read(path, place)
        later = chunks[index + 1 :]
        assert [(c.pages, c.first, c.bytes, c.after) for c in again] == [
            (c.pages, c.first, c.bytes, c.after) for c in later
        ]
        if packing not in ("bz2", "gz", "zst"):
            assert 0 <= place.byte - place.start[1] < 500_000, "it unpacks what is done"


def test_small_reads_change_nothing(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``</page>`` and ``<page>`` are cut by block borders in every way."""
    path = tmp_path / "d"
    path.write_bytes(dump(many_pages(20)))
    whole = [(chunk.pages, chunk.bytes) for chunk in read(path)]
    for size in (3, 7, 64):
        monkeypatch.setattr("mtk.curation.wikipedia.stream.PLAIN_BLOCK", size)
        assert [(chunk.pages, chunk.bytes) for chunk in read(path)] == whole


def test_the_site_is_read_from_the_head(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(dump([Page("A", "b")], "de"))
    site = read_site(tmp_path / "d")
    assert (site.name, site.language) == ("dewiki", "de")
    assert (6, "Datei") in site.namespaces and site.names_of(14) == ("Kategorie",)
    assert site.url("C++ & Ä/b (x)") == "https://de.wikipedia.org/wiki/C%2B%2B_%26_%C3%84/b_(x)"
    assert site.namespace_of("vorlage:X") == 10 and site.namespace_of("X: y") == 0


def broken(data: bytes) -> dict[str, tuple[bytes, str]]:
    packed = bz2.compress(data)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    second = data.index(b"<page>", data.index(b"</page>"))
    return {
        "cut in a page": (data[: len(data) // 2], "cut short"),
        "cut after a page": (data.removesuffix(TAIL.encode()), "cut short"),
        "cut in the head": (data[:300], "cut short"),
        "cut bz2": (packed[: len(packed) // 2], "the stream is broken"),
        "cut gz": (gzip.compress(data)[:-2000], "the stream is broken"),
        "cut zst": (zstandard.ZstdCompressor().compress(data)[:-500], "the stream is broken"),
        "damaged bz2": (bytes(damaged), "the stream is broken"),
        "stray element": (data[:second] + b"<x/>" + data[second:], "page 2 (byte"),
        "two dumps": (data + data, f"page {COUNT + 1} (byte {len(data) - len(TAIL)}"),
        "HTML": (b"<!-- a --><html><body></body></html>", "begins with <html>"),
        "text": (b"hello world", "not XML"),
        "empty": (b"", "begins with no element"),
        "UTF-16": (data.decode().encode("utf-16"), "UTF-16"),
        "declared encoding": (b'<?xml version="1.0" encoding="latin1"?>' + data, "latin1"),
        "entity bomb": (
            b'<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>' + data,
            "declares a document type",
        ),
    }


@pytest.mark.parametrize("name", broken(dump(many_pages(COUNT))))
def test_broken_dumps_are_told(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d"
    content, words = broken(data)[name]
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)) as told:
        read(path)
    assert words in str(told.value)


def test_the_place_of_a_break_is_exact(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d"
    at = data.index(b"</page>", len(data) // 2) - 100
    path.write_bytes(data[:at])
    whole = data[:at].count(b"</page>")
    with pytest.raises(DataError, match=rf"page {whole + 1} \(byte {at} uncompressed\)"):
        read(path)


def test_an_endless_page_is_refused(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LARGEST_PAGE", 1 << 20)
    path = tmp_path / "d"
    path.write_bytes(head().encode() + b"<page><title>" + b"a" * (4 << 20))
    with pytest.raises(DataError, match="does not end within 1 MiB"):
        read(path)


def test_fields_of_a_page() -> None:
    page = parse_page(Page("A & <B>", "x < y &amp;", ns=4, redirect="C").xml(5).strip().encode())
    assert (page.title, page.ns, page.id, page.redirect) == ("A & <B>", "4", "5", True)
    assert (page.revision, page.timestamp) == ("10005", "2024-01-06T00:00:00Z")
    assert (page.text, page.model) == ("x < y &amp;", "wikitext")


def test_of_several_revisions_the_last_counts() -> None:
    revision = "<revision><id>{0}</id><text>text {0}</text></revision>"
    xml = "<page><title>A</title><id>1</id>" + revision.format(1) + revision.format(2) + "</page>"
    page = parse_page(xml.encode())
    assert (page.revision, page.text, page.id) == ("2", "text 2", "1")


@pytest.mark.parametrize(
    ("xml", "reason", "byte"),
    [
        (b"<page><title>A</titel></page>", "malformed XML", 16),
        (b"<page><title>\xff</title></page>", "malformed XML", 13),
        (b"<page>&unknown;</page>", "malformed XML", 6),
        (b"<page><id>1</id></page>", "no title", 0),
        (b"<page><title>A</title></page>", "no id", 0),
    ],
)
def test_bad_pages(xml: bytes, reason: str, byte: int) -> None:
    with pytest.raises(PageError) as told:
        parse_page(xml)
    assert (told.value.reason, told.value.byte) == (reason, byte)
