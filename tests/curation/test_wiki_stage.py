"""``mtk curate wikipedia`` as a user meets it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mtk.artifacts import open_artifact, verify, verify_lineage
from mtk.artifacts.parts import parts_folder
from mtk.cli.main import main
from mtk.curation.wikipedia.site import Site, read_site
from tests.curation.wiki_dumps import Page, dump, head, many_pages

PAGES = [
    Page("Anarchism", "'''Anarchism''' is [[a]].\n\n== References ==\n* x"),
    Page("Old name", "#REDIRECT [[Anarchism]]", redirect="Anarchism"),
    Page("List of things", "* [[A]] is a thing"),
    Page("A (disambiguation)", "* [[A]]\n* [[B]]"),
    Page("Talk:Anarchism", "A talk.", ns=1),
    Page("C++ & more", "Short <math>x</math> text."),
    Page("Nothing", "{{Infobox}}"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d.xml").write_bytes(dump(PAGES))
    return tmp_path


def run(folder: Path, *more: str, code: int = 0) -> Path:
    command = ["curate", "wikipedia", "--input", str(folder / "d.xml"), "--workers", "1"]
    command += () if "--output" in more else ["--output", str(folder / "out" / "w.jsonl")]
    assert main([*command, *more]) == code
    return folder / "out" / "w.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_records_and_manifest(folder: Path) -> None:
    out = run(folder)
    assert records(out) == [
        {
            "id": "1",
            "url": "https://en.wikipedia.org/wiki/Anarchism",
            "title": "Anarchism",
            "text": "Anarchism is a.",
        },
        {
            "id": "3",
            "url": "https://en.wikipedia.org/wiki/List_of_things",
            "title": "List of things",
            "text": "A is a thing",
        },
        {
            "id": "6",
            "url": "https://en.wikipedia.org/wiki/C%2B%2B_%26_more",
            "title": "C++ & more",
            "text": "Short text.",
        },
    ]
    assert files(out.parent) == ["w.artifact.json", "w.dropped.jsonl", "w.jsonl"]
    artifact = open_artifact(out.parent / "w.artifact.json", "corpus")
    verify(artifact)
    assert set(verify_lineage(artifact).values()) == {"verified"}
    reasons = {"redirect": 1, "disambiguation": 1, "namespace": 1, "empty": 1}
    assert artifact.metrics["dropped_by_reason"] == reasons
    assert (artifact.metrics["pages"], artifact.metrics["documents"]) == (7, 3)
    assert artifact.metrics["text_bytes"] == sum(len(r["text"].encode()) for r in records(out))
    assert (artifact.metrics["wikis"], artifact.metrics["languages"]) == (["enwiki"], ["en"])


def test_what_was_dropped_is_listed_with_its_place(folder: Path) -> None:
    out = run(folder)
    listed = records(out.with_name("w.dropped.jsonl"))
    assert [(entry["title"], entry["reason"]) for entry in listed] == [
        ("Old name", "redirect"),
        ("A (disambiguation)", "disambiguation"),
        ("Talk:Anarchism", "namespace"),
        ("Nothing", "empty"),
    ]
    data = (folder / "d.xml").read_bytes()
    for entry in listed:
        page = data[entry["byte"] :].partition(b"</page>")[0].decode()
        assert f"<title>{entry['title']}</title>" in page
        assert f"<id>{entry['id']}</id>" in page


@pytest.mark.parametrize(
    ("more", "titles"),
    [
        (["--lists", "drop"], ["Anarchism", "C++ & more"]),
        (["--namespaces", "1"], ["Talk:Anarchism"]),
        (
            ["--namespaces", "0", "1", "--lists", "drop"],
            ["Anarchism", "Talk:Anarchism", "C++ & more"],
        ),
        (["--min-characters", "12", "--lists", "drop"], ["Anarchism"]),
        (
            ["--disambiguations", "keep", "--lists", "drop"],
            ["Anarchism", "A (disambiguation)", "C++ & more"],
        ),
        (
            ["--disambiguation-templates", "Nowhere", "--lists", "drop"],
            ["Anarchism", "C++ & more"],
        ),
    ],
)
def test_which_pages(folder: Path, more: list[str], titles: list[str]) -> None:
    assert [record["title"] for record in records(run(folder, *more))] == titles


def test_which_text(folder: Path) -> None:
    out = run(folder, "--end-sections", "keep", "--math", "latex", "--revision", "--no-headings")
    found = {record["title"]: record for record in records(out)}
    assert found["Anarchism"]["text"] == "Anarchism is a.\n\nx"
    assert found["C++ & more"]["text"] == "Short $x$ text."
    assert found["Anarchism"]["revision"] == "10001"
    assert found["Anarchism"]["timestamp"] == "2024-01-02T00:00:00Z"


def test_further_disambiguation_templates(folder: Path) -> None:
    pages = [*PAGES, Page("B", "{{Meinwort|x}} may be"), Page("C", "{{Meinwortspiel}} is")]
    (folder / "d.xml").write_bytes(dump(pages))
    out = run(folder, "--disambiguation-templates", "Meinwort")
    titles = [record["title"] for record in records(out)]
    assert "B" not in titles and "C" in titles


def test_packed_output_holds_the_same(folder: Path) -> None:
    (folder / "d.xml").write_bytes(dump(many_pages(500)))
    plain = run(folder).read_bytes()
    for end in (".gz", ".zst"):
        run(folder, "--output", str(folder / end / f"w.jsonl{end}"))
    packed = (folder / ".gz" / "w.jsonl.gz").read_bytes()
    assert gzip.decompress(packed) == plain and len(packed) < 0.5 * len(plain)
    reader = zstandard.ZstdDecompressor().stream_reader(
        io.BytesIO((folder / ".zst" / "w.jsonl.zst").read_bytes()), read_across_frames=True
    )
    assert reader.read() == plain


@pytest.mark.slow
def test_neither_workers_nor_parts_change_a_byte(folder: Path) -> None:
    data = dump(many_pages(1500))
    (folder / "d.xml").write_bytes(bz2.compress(data))
    contents = set()
    for number, more in enumerate(
        (["--part-pages", "100000"], ["--workers", "2"], ["--workers", "3", "--part-pages", "250"])
    ):
        out = folder / str(number)
        run(folder, *more, "--output", str(out / "w.jsonl.gz"))
        contents.add(tuple((out / n).read_bytes() for n in ("w.jsonl.gz", "w.dropped.jsonl")))
    assert len(contents) == 1


def test_several_files_keep_their_order_and_their_namespaces(folder: Path) -> None:
    (folder / "a.xml").write_bytes(dump([Page("Ä", "[[Datei:x.jpg|y]]Eins")], "de"))
    (folder / "b.xml").write_bytes(dump([Page("B", "[[Datei:x.jpg|y]] two")], first=50))
    run(folder, "--input", str(folder / "[ab].xml"), "--output", str(folder / "o" / "w.jsonl"))
    found = records(folder / "o" / "w.jsonl")
    assert [record["text"] for record in found[-2:]] == ["Eins", "two"]
    assert found[-2]["url"].startswith("https://de.")


def test_a_dump_that_changes_meanwhile_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def reads(path: Path) -> Site:
        site = read_site(path)
        path.write_bytes(path.read_bytes() + b" ")
        return site

    monkeypatch.setattr("stages.curate_wikipedia.read_site", reads)
    run(folder, code=3)
    assert "changed while it was read" in capfd.readouterr().err
    assert files(folder / "out") == []


def test_the_same_dump_twice_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "d.xml.bz2").write_bytes(bz2.compress((folder / "d.xml").read_bytes()))
    run(folder, "--input", str(folder / "d.xml*"), code=3)
    assert "d.xml.bz2 both begin with page 1 of enwiki" in capfd.readouterr().err


def test_the_list_is_bounded_for_each_reason(folder: Path) -> None:
    (folder / "d.xml").write_bytes(dump([*many_pages(900), *PAGES]))
    out = run(folder, "--list-dropped", "5", "--part-pages", "1")
    reasons = [entry["reason"] for entry in records(out.with_name("w.dropped.jsonl"))]
    assert reasons.count("redirect") == 5 and reasons.count("disambiguation") == 1
    run(folder, "--list-dropped", "0", "--output", str(folder / "none" / "w.jsonl"))
    assert files(folder / "none") == ["w.artifact.json", "w.jsonl"]


def test_it_does_not_run_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = run(folder)
    stamp = out.stat().st_mtime_ns
    parts_folder(out.parent / "w").mkdir()  # as left by a kill just after publishing
    run(folder, "--workers", "2", "--part-pages", "7")
    assert "is complete, skipped" in capfd.readouterr().err
    assert out.stat().st_mtime_ns == stamp
    assert files(out.parent) == ["w.artifact.json", "w.dropped.jsonl", "w.jsonl"]
    run(folder, "--lists", "drop", code=4)
    assert "--force" in capfd.readouterr().err
    run(folder, "--lists", "drop", "--force")
    assert len(records(out)) == 2


def test_bad_pages(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pages = [page.xml(number) for number, page in enumerate(PAGES[:3], start=1)]
    bad = [
        "<page><title>Half</title><id>8</id><b></page>\n",
        "<page><title></title><id>9</id></page>\n",
    ]
    text = head() + pages[0] + bad[0] + pages[1] + bad[1] + pages[2] + "</mediawiki>"
    (folder / "d.xml").write_text(text)
    run(folder, code=3)
    message = capfd.readouterr().err
    byte = text.index(bad[0]) + bad[0].index("</page>")
    assert f"page 2 (byte {byte + 2} uncompressed, 'Half'): malformed XML: mismatched" in message
    assert "--on-bad-page skip" in message
    assert not (folder / "out").exists() or files(folder / "out") == []
    out = run(folder, "--on-bad-page", "skip", "--json")
    metrics = json.loads(capfd.readouterr().out.splitlines()[-1])["metrics"]
    assert metrics["dropped_by_reason"] == {"malformed XML": 1, "no title": 1, "redirect": 1}
    assert len(records(out)) == 2


def test_a_fault_of_the_cleaner_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(text: str, title: str, rules: object) -> str:
        if title == "C++ & more":
            raise RecursionError("too deep")
        return text

    monkeypatch.setattr("mtk.curation.wikipedia.extract.plain_text", fails)
    run(folder, code=3)
    assert "page 6 (byte" in (message := capfd.readouterr().err)
    assert "'C++ & more'): cannot be cleaned: RecursionError('too deep')" in message
    assert len(records(run(folder, "--on-bad-page", "skip"))) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (dump([]), "none of the 0 pages is kept (the dump is empty)"),
        (dump(PAGES[1:2]), "none of the 1 pages is kept (1 redirect)"),
        (dump(PAGES)[:2000], "cut short"),
        (bz2.compress(dump(many_pages(300)))[:-4000], "the stream is broken"),
        (b"<html></html>", "not a MediaWiki export"),
    ],
)
def test_bad_dumps_leave_nothing(
    folder: Path, content: bytes, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "d.xml").write_bytes(content)
    run(folder, "--part-pages", "1", code=3)
    assert words in capfd.readouterr().err
    assert not (folder / "out").exists() or files(folder / "out") == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--output", "w.txt"], "w.txt.jsonl"),
        (["--output", "dir/"], "must be a file name"),
        (["--text-templates", "nowrap"], "NAME=NUMBER"),
        (["--workers", "0"], "workers"),
        (["--part-pages", "0"], "part_pages"),
        (["--min-characters", "-1"], "min_characters"),
    ],
)
def test_wrong_options(
    folder: Path, more: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run(folder, *more, code=2)
    assert words in capfd.readouterr().err


def test_missing_inputs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for given, words in (("nowhere.xml", "no such file"), (str(folder), "is a folder")):
        command = ["curate", "wikipedia", "--input", given, "--output", str(folder / "w.jsonl")]
        assert main(command) == 3
        assert words in capfd.readouterr().err


def test_another_file_is_not_overwritten(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "w.jsonl").write_text("mine")
    assert run(folder, code=4).read_text() == "mine"


def test_preprocess_takes_the_output(folder: Path) -> None:
    from tests.preprocess.corpora import command, documents

    out = run(folder)
    more = ["--input", str(out), "--json-keys", "text", "title"]
    assert main(command(folder, *more)) == 0
    assert len(documents(folder / "out" / "P_text_document")) == 3
    assert len(documents(folder / "out" / "P_title_document")) == 3


def test_one_page_by_hand(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "p.txt").write_text("'''A''' {{x}} [[b|c]]<math>d</math>\n== Weblinks ==\ne")
    assert main(["curate", "wikitext", str(folder / "p.txt")]) == 0
    assert capfd.readouterr().out == "A c\n\nWeblinks\n\ne\n"
    command = [
        "curate",
        "wikitext",
        str(folder / "p.txt"),
        "--language",
        "de",
        "--set",
        "math=latex",
    ]
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == "A c$d$"
    assert main(["curate", "wikitext", str(folder / "p.txt"), "--set", "maths=latex"]) == 2
    (folder / "p.txt").write_bytes(b"a\xff")
    assert main(["curate", "wikitext", str(folder / "p.txt")]) == 3
    assert "byte 1" in capfd.readouterr().err
