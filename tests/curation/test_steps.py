"""What all steps have in common: inputs, outputs, workers, mistakes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mtk.artifacts import find_marker, open_artifact
from mtk.cli.main import main
from tests.curation.commands import STEPS, command, contents, corpus
from tests.curation.inputs import read_lines, write_lines
from tests.preprocess.test_bad_records import BAD


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the crawl, and what each step makes of it in ``{step}/P.jsonl``."""
    found = tmp_path_factory.mktemp("steps")
    corpus(found)
    for step in (*STEPS, "web"):
        assert main(command(step, found, output=f"{step}/P.jsonl")) == 0
    return found


@pytest.mark.parametrize("step", STEPS)
def test_neither_workers_nor_parts_change_a_byte(step: str, folder: Path) -> None:
    expected = contents(folder / step)
    assert len(expected["P.jsonl"]) > 500_000
    for name, more in {
        "parts": ("--part-mb", "0.2"),
        "workers": ("--workers", "2", "--part-mb", "0.001"),
    }.items():
        output = f"{step}-{name}/P.jsonl"
        assert main(command(step, folder, *more, output=output)) == 0
        assert contents(folder / f"{step}-{name}") == expected


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_output_and_input(step: str, folder: Path, suffix: str) -> None:
    more = ("--part-mb", "0.3")
    output = f"{step}{suffix}/P.jsonl{suffix}"
    assert main(command(step, folder, *more, output=output)) == 0
    expected = (folder / step / "P.jsonl").read_bytes()
    packed = (folder / output).read_bytes()
    if suffix == ".gz":
        assert gzip.decompress(packed) == expected
    else:
        with zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as reader:
            assert reader.read() == expected
    assert len(packed) < len(expected) / 2
    again = f"{step}{suffix}-again/P.jsonl{suffix}"
    assert main(command(step, folder, *more, "--workers", "2", output=again)) == 0
    assert (folder / again).read_bytes() == packed
    from mtk.data.records import read_texts

    texts = list(read_texts([folder / output], ["text"], "file"))
    assert texts == [json.loads(line)["text"] for line in expected.splitlines()]


@pytest.mark.parametrize("step", STEPS)
def test_other_formats_of_the_same_records(step: str, folder: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    expected = read_lines(folder / step / "P.jsonl")
    lines = (folder / "in.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\r\n".join(lines)))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    half = len(lines) // 2
    (tmp_path / "d1.jsonl").write_bytes(b"\n".join(lines[:half]))
    (tmp_path / "d2.jsonl").write_bytes(b"\n".join(lines[half:]) + b"\n")
    for name in ("a.json", "b.jsonl.gz", "c.parquet", "d?.jsonl"):
        output = tmp_path / f"out-{name[0]}.jsonl"
        base = command(step, folder, "--input", str(tmp_path / name))
        base[base.index("--output") + 1] = str(output)
        assert main([*base, "--part-mb", "0.4"]) == 0
        found = read_lines(output)
        if name[0] == "d":  # pieces are named after the number in their file
            for record in [*found, *expected]:
                record.pop("split_id", None)
        assert found == expected


@pytest.mark.parametrize(
    ("step", "name"),
    [
        *(("urls", name) for name in BAD),
        *((step, name) for step in STEPS[1:] for name in ("cut off", "latin-1", "null value")),
    ],
)
def test_bad_records_are_those_of_preprocess(
    step: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad, reason, inside = BAD[name]
    key = "url" if step == "urls" else "text"
    line = bad.replace(b'"text"', b'"url"') if step == "urls" else bad
    text = "http://example.org/1" if step == "urls" else "http and several words " * 90
    good = json.dumps({key: text}).encode()
    other = good.replace(b"http", b"HTTP")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join((good, other, line, other, line)) + b"\n")
    write_lines(tmp_path / "eval.jsonl", [{"text": "a b c d e f g h i j"}])
    assert main(command(step, tmp_path)) == 3
    message = capfd.readouterr().err
    if step != "urls" or inside == 0:
        byte = len(good) + len(other) + 2 + inside
        assert f"{tmp_path / 'in.jsonl'}, line 3 (byte {byte}): {reason}" in message
    assert reason in message and "--on-bad-line skip" in message
    assert list((tmp_path / "out").iterdir()) == []
    assert (
        main([*command(step, tmp_path), "--on-bad-line", "skip", "--max-bad-fraction", "0.3"]) == 3
    )
    assert "2 of 5 records are bad" in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert main([*command(step, tmp_path), "--on-bad-line", "skip"]) == 0
    metrics = open_artifact(tmp_path / "out" / "P").metrics
    assert metrics["bad_by_reason"] == {reason: 2} and metrics["pages"] == 3
    listed = read_lines(tmp_path / "out" / "P.bad_lines.jsonl")
    assert [(entry["number"], entry["reason"]) for entry in listed] == [(3, reason), (5, reason)]


def test_the_list_of_bad_records_is_bounded(tmp_path: Path) -> None:
    good = [json.dumps({"url": f"http://example.org/{i}"}) for i in range(10)]
    (tmp_path / "in.jsonl").write_text("\n".join([*good, *["{"] * 12_000]))
    more = ("--on-bad-line", "skip", "--part-mb", "0.001")
    assert main(command("urls", tmp_path, *more)) == 0
    assert len(read_lines(tmp_path / "out/P.bad_lines.jsonl")) == 10_000
    assert open_artifact(tmp_path / "out/P").metrics["bad_records"] == 12_000


@pytest.mark.parametrize("step", (*STEPS, "web"))
def test_a_complete_step_is_skipped_and_another_refused(
    step: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = f"{step}/P.jsonl"
    before = (folder / step / "P.artifact.json").read_bytes()
    (folder / step / ".P.parts").mkdir(exist_ok=True)  # as a kill after publishing leaves it
    assert main(command(step, folder, "--workers", "2", output=output)) == 0
    assert "is complete, skipped" in capfd.readouterr().err
    assert (folder / step / "P.artifact.json").read_bytes() == before
    if step != "web":
        assert not (folder / step / ".P.parts").exists()
    assert main(command(step, folder, "--on-bad-line", "skip", output=output)) == 4
    assert "already holds an artifact" in capfd.readouterr().err
    (folder / step / ".P.parts").rmdir() if step == "web" else None
    assert not (folder / step / ".P.parts").exists()


def test_nothing_is_left_of_a_step_that_finds_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "in.jsonl", [{"url": "http://facebook.com/", "text": "short"}] * 3)
    for step, words in (("urls", "3 blocked domain"), ("clean", "3 too few tokens")):
        assert main(command(step, tmp_path)) == 3
        message = capfd.readouterr().err
        assert f"curate {step} drops all 3 pages" in message and words in message
        assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "in.jsonl").write_text("")
    for step in ("urls", "clean", "duplicates"):
        assert main(command(step, tmp_path)) == 3
        assert "holds no records" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("step", "more", "code", "words"),
    [
        ("urls", ["--output", "P.csv"], 2, "must be a file name ending in .jsonl"),
        ("clean", ["--output", "P.txt"], 2, "Nearest: P.txt.jsonl"),
        ("clean", ["--languages", "eng"], 2, "is not a language that can be told"),
        ("clean", ["--languages", "en", "all"], 2, "or all alone"),
        ("clean", ["--min-tokens", "-1"], 2, "must be at least 0"),
        ("clean", ["--part-mb", "0"], 2, "must be greater than 0"),
        ("clean", ["--workers", "0"], 2, "must be at least 1"),
        ("clean", ["--length-tokenizer", "nowhere"], 4, "nowhere is absent"),
        ("clean", ["--text-key", "body"], 3, "missing key: no 'body'"),
        ("duplicates", ["--group-similarity", "0.4"], 2, "is below --pair-similarity 0.5"),
        ("duplicates", ["--group-similarity", "1.4"], 2, "Nearest: 1.0."),
        ("duplicates", ["--bands", "0"], 2, "must be at least 1"),
        ("decontaminate", ["--min-ngram", "14"], 2, "is above --max-ngram 13"),
        ("decontaminate", ["--evaluation-race", "nowhere"], 3, "--evaluation-race nowhere"),
        ("web", ["--leave-out", "urls", "cleam"], 2, "must be one of 'urls', 'clean'"),
        ("web", ["--leave-out", *STEPS], 2, "leaves no step to run"),
        ("urls", ["--max-bad-fraction", "0.1"], 2, "needs --on-bad-line skip"),
    ],
)
def test_mistakes(
    step: str,
    more: list[str],
    code: int,
    words: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = command(step, folder)
    base[base.index("--output") + 1] = str(tmp_path / "out" / "P.jsonl")
    assert main([*base, *more]) == code
    assert words in capfd.readouterr().err
    assert find_marker(tmp_path / "out" / "P") is None


def test_the_output_is_never_its_own_input(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "in.jsonl", [{"url": f"http://a.org/{i % 3}"} for i in range(6)])
    glob = ("--input", str(tmp_path / "*.jsonl"))
    for _ in range(2):  # the second time the glob would match P.jsonl and its lists
        assert main(command("urls", tmp_path, *glob, output="P.jsonl")) == 0
    assert "is complete, skipped" in capfd.readouterr().err
    own = ("--input", str(tmp_path / "P.jsonl"))
    assert main(command("urls", tmp_path, *own, output="P.jsonl")) == 3
    assert "is the output of this command" in capfd.readouterr().err


def test_fields_that_utf8_cannot_hold_stay(tmp_path: Path) -> None:
    text = "some words of a text " * 60
    line = '{"text": "caf\\u00c3\\u00a9  TEXT", "title": "half \\ud83d", "n": 1.50}\n'
    (tmp_path / "in.jsonl").write_text(line.replace("TEXT", text))
    assert main(command("clean", tmp_path)) == 0
    [found] = read_lines(tmp_path / "out/P.jsonl")
    assert found["title"] == "half \ud83d" and found["text"].startswith("café some")


def test_web_is_its_steps_one_after_another(folder: Path, tmp_path: Path) -> None:
    source = str(folder / "in.jsonl")
    for step in STEPS:
        output = str(tmp_path / f"{step}.jsonl")
        base = command(step, folder, "--input", source)
        base[base.index("--output") + 1] = output
        assert main(base) == 0
        source = output
    assert (tmp_path / "decontaminate.jsonl").read_bytes() == (folder / "web/P.jsonl").read_bytes()
    assert {path.name for path in (folder / "web").iterdir()} == {
        "P.artifact.json",
        *(f"P.{step}.dropped.jsonl" for step in STEPS),
        "P.jsonl",
    }
    inputs = [item.role for item in open_artifact(folder / "web/P").inputs]
    assert inputs == ["corpus", "domain list", "extension list", "evaluation set 1"]


def test_web_with_other_options_replaces_its_steps(folder: Path, tmp_path: Path) -> None:
    def made(*more: str) -> dict[str, Any]:
        base = command("web", folder, "--leave-out", "urls", "decontaminate", "--keep-steps")
        base[base.index("--output") + 1] = str(tmp_path / "P.jsonl.gz")
        assert main([*base, *more, "--force"]) == 0
        return dict(open_artifact(tmp_path / "P").metrics["steps"])

    first = made()
    assert list(first) == ["clean", "duplicates"]
    names = sorted(path.name for path in (tmp_path / "P.steps").glob("*.jsonl*"))
    assert "1_clean.jsonl" in names and "2_duplicates.jsonl.gz" in names
    second = made("--min-tokens", "400")
    assert second["clean"]["pages_kept"] < first["clean"]["pages_kept"]
