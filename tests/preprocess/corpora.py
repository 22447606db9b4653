"""Small corpora and the plainest correct preprocessing to compare with."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtk.config import make
from mtk.config.preprocess import PreprocessConfig
from mtk.data.indexed_dataset import IndexedDataset
from mtk.log import Reporter
from mtk.session import Session
from mtk.tokenizers import Tokenizer, load_tokenizer
from tests.tokenizers.samples import TRICKY, trained

TEXTS = [*TRICKY, *(f"Document {i}. It has Dr. No in it! " * (i % 7) for i in range(60))]
QUIET = Session(Reporter(quiet=True))


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def corpus(folder: Path, texts: list[str] = TEXTS) -> Path:
    return jsonl(folder / "c.jsonl", [{"text": text, "id": i} for i, text in enumerate(texts)])


def tokenizer_in(folder: Path) -> Tokenizer:
    if not (folder / "tok").exists():
        trained("bpe").save(folder / "tok")
    return load_tokenizer(folder / "tok")


def config(folder: Path, **values: Any) -> PreprocessConfig:
    tokenizer_in(folder)
    defaults = {
        "input": (str(folder / "c.jsonl"),),
        "output_prefix": str(folder / "out" / "P"),
        "tokenizer_model": str(folder / "tok"),
        "workers": 1,
    }
    return make(PreprocessConfig, **(defaults | values))


def command(folder: Path, *more: str) -> list[str]:
    tokenizer_in(folder)
    base = ["preprocess", "--tokenizer-model", str(folder / "tok"), "--workers", "1"]
    base += ["--output-prefix", str(folder / "out" / "P")]
    return [*base, *(() if "--input" in more else ("--input", str(folder / "c.jsonl"))), *more]


def documents(prefix: Path | str) -> list[list[list[int]]]:
    """Document -> sequence -> tokens, as stored."""
    dataset = IndexedDataset(prefix)
    ends = dataset.document_indices.tolist()
    return [[dataset[i].tolist() for i in range(first, last)] for first, last in pairwise(ends)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the manifests, whose times differ."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("artifact.json")
    }
