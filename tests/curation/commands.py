"""The four steps as command lines over one folder, with an input that each has work with."""

from __future__ import annotations

import json
from pathlib import Path

from tests.curation.crawl import make_crawl

STEPS = ("urls", "clean", "duplicates", "decontaminate")


def corpus(folder: Path, times: int = 1) -> Path:
    """The crawl several times over, each time as other pages: in.jsonl, eval.jsonl."""
    crawl = make_crawl()
    with (folder / "in.jsonl").open("w", encoding="utf-8") as stream:
        for turn in range(times):
            mark = f" {turn}" * turn
            for record in crawl.records:
                text = record["text"].replace(". ", f".{mark} ")
                fields = record | {"id": f"{turn}-{record['id']}", "text": text}
                fields["url"] = record["url"].replace("http://", f"http://t{turn}.")
                stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
    (folder / "eval.jsonl").write_text(
        "".join(json.dumps({"text": passage}) + "\n" for passage in crawl.passages)
    )
    return folder / "in.jsonl"


def command(step: str, folder: Path, *more: str, output: str = "out/P.jsonl") -> list[str]:
    """Arguments of mtk."""
    found = ["curate", step, "--output", str(folder / output), "--list-dropped", "--id-key", "id"]
    if "--input" not in more:
        found += ["--input", str(folder / "in.jsonl")]
    if "--workers" not in more:
        found += ["--workers", "1"]
    if step in ("decontaminate", "web"):
        found += ["--evaluation-jsonl", str(folder / "eval.jsonl")]
    if step == "duplicates":
        found += ["--list-pairs"]
    return [*found, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the manifests, whose times differ."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("artifact.json")
    }
