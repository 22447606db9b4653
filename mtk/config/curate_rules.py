"""Groups of options that the steps of ``mtk curate web`` have, each step some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem


def _share(key: str, value: float) -> Iterator[Problem]:
    if not 0 <= value <= 1:
        yield Problem(key, value, "must lie in 0..1", f"Nearest: {min(max(value, 0.0), 1.0)}.")


def _at_least(least: int, **values: int) -> Iterator[Problem]:
    for key, value in values.items():
        if value < least:
            yield Problem(key, value, f"must be at least {least}", f"Nearest: {least}.")


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How records are read, reported and worked on."""

    on_bad_line: Literal["fail", "skip"] = option(
        "fail", help="Stop at a record that cannot be used, or leave it out, count and list it."
    )
    max_bad_fraction: float | None = option(
        None, help="With skip: fail after all if more than this share of the records is bad."
    )
    list_dropped: bool = option(
        False, help="Write P.dropped.jsonl: what was left out, from where, and why."
    )
    id_key: str = option("url", help="Field that names a page in lists (else its place does).")
    part_mb: float = option(
        64.0, help="A killed run goes on after the last so many MB of (uncompressed) input."
    )
    workers: int | None = option(
        None, help="Processes (default: by cores and size of the input).", runtime=True
    )

    def problems(self) -> Iterator[Problem]:
        if not self.part_mb > 0:
            yield Problem("part_mb", self.part_mb, "must be greater than 0", "Usual: 64.")
        if self.workers is not None:
            yield from _at_least(1, workers=self.workers)
        fraction = self.max_bad_fraction
        if fraction is not None:
            if self.on_bad_line == "fail":
                yield Problem("max_bad_fraction", fraction, "needs --on-bad-line skip")
            yield from _share("max_bad_fraction", fraction)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Where the text of a record is."""

    text_key: str = option("text", help="Field of a record that is its text.")
    text_documents: Literal["file", "blank-line", "line"] = option(
        "file", help="What is one document in a .txt file."
    )

    def problems(self) -> Iterator[Problem]:
        if not self.text_key:
            yield Problem("text_key", self.text_key, "names no field", "Usual: text.")


@dataclass(frozen=True, kw_only=True)
class UrlRules:
    """Which URLs are dropped."""

    url_key: str = option("url", help="Field of a record that is its URL.")
    domain_list: str | None = option(
        None, help="File of sites to drop instead of mtk's own list (entries, # comments)."
    )
    block_domains: tuple[str, ...] = option(
        (), help="Further sites: a name (reddit), a domain (example.org) or a host."
    )
    allow_domains: tuple[str, ...] = option((), help="Entries of the list that are not to count.")
    extension_list: str | None = option(
        None, help="File of extensions to drop instead of mtk's own list (.pdf .zip ...)."
    )
    min_url_length: int = option(9, help="Shorter URLs are dropped.")

    def problems(self) -> Iterator[Problem]:
        if not self.url_key:
            yield Problem("url_key", self.url_key, "names no field", "Usual: url.")
        yield from _at_least(0, min_url_length=self.min_url_length)


@dataclass(frozen=True, kw_only=True)
class CleanRules:
    """How texts are repaired, and which are dropped."""

    repair: bool = option(True, help="Undo mojibake and the like (ftfy).")
    whitespace: Literal["lines", "spaces", "keep"] = option(
        "lines",
        help="lines: single spaces, at most one empty line. spaces: one line a page. keep: as is.",
    )
    languages: tuple[str, ...] = option(
        ("en",), help="Languages to keep (ISO 639 codes); all: no language filter."
    )
    min_tokens: int = option(128, help="Texts of fewer tokens are dropped; 0 turns it off.")
    min_chars: int = option(0, help="Texts of fewer characters are dropped.")
    javascript_chars: int = option(
        256, help="Texts of fewer characters that speak of JavaScript are dropped."
    )
    length_tokenizer: str | None = option(
        None, help="Tokenizer artifact that counts tokens (default: words and signs count)."
    )

    @property
    def kept_languages(self) -> tuple[str, ...]:
        """Empty for all."""
        return () if self.languages == ("all",) else self.languages

    def problems(self) -> Iterator[Problem]:
        yield from _at_least(
            0,
            min_tokens=self.min_tokens,
            min_chars=self.min_chars,
            javascript_chars=self.javascript_chars,
        )
        if not self.languages or ("all" in self.languages and len(self.languages) > 1):
            yield Problem(
                "languages", self.languages, "must be codes, or all alone", "Nearest: en."
            )


@dataclass(frozen=True, kw_only=True)
class DuplicateRules:
    """Which texts count as the same."""

    shingle: Literal["chars", "words"] = option("chars", help="What a shingle is made of.")
    shingle_size: int = option(5, help="Characters or words of a shingle.")
    bands: int = option(10, help="Bands of a signature; texts meet that share one.")
    rows: int = option(10, help="Minima of a band.")
    minhash_seed: int = option(1234, help="Seed of the minima.")
    jaccard: Literal["union", "min", "max"] = option(
        "union", help="Shared shingles by those of both texts, of the shorter or of the longer."
    )
    pair_similarity: float = option(0.5, help="Pairs above it are listed (--list-pairs).")
    group_similarity: float = option(0.7, help="Pairs from it on are duplicates.")
    bucket_pivots: int = option(
        32, help="Texts of a bucket that are compared with all its others; 0: no limit."
    )
    list_pairs: bool = option(False, help="Write P.pairs.jsonl: similar pages and how similar.")

    def problems(self) -> Iterator[Problem]:
        yield from _at_least(1, shingle_size=self.shingle_size, bands=self.bands, rows=self.rows)
        yield from _at_least(0, minhash_seed=self.minhash_seed, bucket_pivots=self.bucket_pivots)
        yield from _share("pair_similarity", self.pair_similarity)
        yield from _share("group_similarity", self.group_similarity)
        if self.group_similarity < self.pair_similarity:
            rule = f"is below --pair-similarity {self.pair_similarity}, from which pairs are known"
            fix = f"Nearest: {self.pair_similarity}."
            yield Problem("group_similarity", self.group_similarity, rule, fix)


@dataclass(frozen=True, kw_only=True)
class DecontaminationRules:
    """Which texts training must not have seen, and how they are cut out."""

    evaluation_lambada: tuple[str, ...] = option((), help="JSON lines in LAMBADA's format.")
    evaluation_race: tuple[str, ...] = option((), help="RACE's .txt files, or folders of them.")
    evaluation_text: tuple[str, ...] = option(
        (), help="Plain text, as WikiText's; an empty line ends a text."
    )
    evaluation_jsonl: tuple[str, ...] = option((), help="JSON lines of any other set.")
    evaluation_keys: tuple[str, ...] = option(
        ("text", "question"), help="Fields of --evaluation-jsonl; a record needs one of them."
    )
    max_ngram: int = option(13, help="Words of the runs that are looked for.")
    min_ngram: int = option(8, help="A shorter evaluation text counts whole if it has so many.")
    frequent: int = option(10, help="Runs that the corpus holds so often cut nothing.")
    cut_chars: int = option(200, help="Characters that go with a match on each side.")
    min_piece_chars: int = option(200, help="Pieces of not more characters are dropped.")
    max_pieces: int = option(10, help="Texts that fall into more pieces are dropped.")

    @property
    def names_files(self) -> bool:
        return bool(
            self.evaluation_lambada
            or self.evaluation_race
            or self.evaluation_text
            or self.evaluation_jsonl
        )

    def problems(self) -> Iterator[Problem]:
        yield from _at_least(
            1,
            max_ngram=self.max_ngram,
            min_ngram=self.min_ngram,
            frequent=self.frequent,
            max_pieces=self.max_pieces,
        )
        yield from _at_least(0, cut_chars=self.cut_chars, min_piece_chars=self.min_piece_chars)
        if self.min_ngram > self.max_ngram:
            rule = f"is above --max-ngram {self.max_ngram}"
            yield Problem("min_ngram", self.min_ngram, rule, f"Nearest: {self.max_ngram}.")
        if self.evaluation_jsonl and not self.evaluation_keys:
            yield Problem("evaluation_keys", (), "names no field", "Usual: text question.")
