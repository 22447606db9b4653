"""Options of ``mtk preprocess``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import group, option
from mtk.config.tokenizer import TokenizerConfig
from mtk.errors import Problem


def ends_in_name(path: str) -> bool:
    """Whether files can be named after the end of ``path``."""
    return path.rpartition("/")[2] not in ("", ".", "..")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Everything ``mtk preprocess`` needs."""

    input: tuple[str, ...] = option(
        help="Corpus files or globs: .jsonl .json .txt, each also .gz or .zst, and .parquet."
    )
    output_prefix: str = option(help="Where to write: P gives P_text_document.bin and so on.")
    json_keys: tuple[str, ...] = option(("text",), help="Fields of a record, one dataset each.")
    split_sentences: bool = option(
        False, help="Store sentences instead of documents (BERT, T5), cut by NLTK's Punkt."
    )
    keep_newlines: bool = option(
        False, help="Keep the white space between sentences (with --split-sentences)."
    )
    append_eod: bool = option(False, help="End every document that has tokens with EOD.")
    lang: str = option("english", help="Language of the Punkt model.")
    text_documents: Literal["file", "blank-line", "line"] = option(
        "file", help="What is one document in a .txt file."
    )
    on_bad_line: Literal["fail", "skip"] = option(
        "fail", help="Stop at a record that cannot be used, or leave it out, count and list it."
    )
    max_bad_fraction: float | None = option(
        None, help="With skip: fail after all if more than this share of the records is bad."
    )
    max_record_mb: int = option(
        256, help="A line or paragraph longer than this (MiB, unpacked) is a bad record."
    )
    tokenizer_engine: Literal["auto", "reference", "fastokens", "words"] = option(
        "auto",
        help="What encodes: the fastest that is proven for the tokenizer, the tokenizer itself, "
        "the package fastokens (byte-level BPE), or looking words up (WordPiece, SentencePiece "
        "BPE). The ids are the same.",
        runtime=True,
    )
    workers: int | None = option(
        None, help="Processes (default: by cores and size of the input).", runtime=True
    )
    tokenizer: TokenizerConfig = group(TokenizerConfig, title="Tokenizer")

    @property
    def level(self) -> str:
        """The last part of the datasets' names."""
        return "sentence" if self.split_sentences else "document"

    def problems(self) -> Iterator[Problem]:
        if not self.input:
            yield Problem("input", self.input, "names no file")
        if not self.json_keys:
            yield Problem("json_keys", self.json_keys, "names no field", "Usual: text.")
        if len(set(self.json_keys)) != len(self.json_keys):
            yield Problem("json_keys", self.json_keys, "names a field twice")
        bad = [key for key in self.json_keys if not key or "/" in key or "\0" in key]
        if bad:
            yield Problem("json_keys", bad[0], "cannot be part of a file name")
        if not ends_in_name(self.output_prefix):
            folder = f"{self.output_prefix.rstrip('/')}/" if self.output_prefix else "./"
            fix = f"Nearest: {folder}corpus."
            yield Problem("output_prefix", self.output_prefix, "must end in a name", fix)
        if self.keep_newlines and not self.split_sentences:
            yield Problem("keep_newlines", True, "needs --split-sentences")
        if self.workers is not None and self.workers < 1:
            yield Problem("workers", self.workers, "must be at least 1", "Nearest: 1.")
        if self.max_record_mb < 1:
            yield Problem("max_record_mb", self.max_record_mb, "must be at least 1", "Nearest: 1.")
        fraction = self.max_bad_fraction
        if fraction is not None and self.on_bad_line == "fail":
            yield Problem("max_bad_fraction", fraction, "needs --on-bad-line skip")
        if fraction is not None and not 0 <= fraction <= 1:
            nearest = min(max(fraction, 0.0), 1.0)
            yield Problem("max_bad_fraction", fraction, "must lie in 0..1", f"Nearest: {nearest}.")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Everything ``mtk merge`` needs."""

    input: str = option(help="Folder of .bin/.idx pairs; merged in the order of their names.")
    output_prefix: str = option(help="Where to write: P gives P.bin and P.idx.")
    match: str = option("*", help="Only datasets whose name fits, e.g. '*_text_document'.")

    def problems(self) -> Iterator[Problem]:
        if not ends_in_name(self.output_prefix):
            yield Problem("output_prefix", self.output_prefix, "must end in a name")
