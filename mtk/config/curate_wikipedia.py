"""Options of ``mtk curate wikipedia``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.preprocess import ends_in_name
from mtk.config.schema import option
from mtk.errors import Problem

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, kw_only=True)
class CurateWikipediaConfig:
    """Everything ``mtk curate wikipedia`` needs."""

    input: tuple[str, ...] = option(
        help="MediaWiki dumps or globs: pages-articles XML, plain or packed with bzip2 (also "
        "multistream), gzip or zstd."
    )
    output: str = option(help="The corpus: F.jsonl, F.jsonl.gz or F.jsonl.zst.")
    namespaces: tuple[int, ...] = option(
        (0,), help="Numbers of the namespaces whose pages are kept; 0 holds the articles."
    )
    disambiguations: Literal["drop", "keep"] = option(
        "drop", help="Pages that only tell apart what has the same name."
    )
    disambiguation_templates: tuple[str, ...] = option(
        (), help="Further templates that mark such pages; those of 30 languages are known."
    )
    lists: Literal["keep", "drop"] = option("keep", help="Pages named 'List of ...' and the like.")
    end_sections: Literal["drop", "keep"] = option(
        "drop", help="References, external links, see also, in the dump's language."
    )
    drop_sections: tuple[str, ...] = option((), help="Headings of further sections to leave out.")
    headings: bool = option(True, help="Keep headings, each as a line of its own.")
    math: Literal["drop", "latex"] = option("drop", help="Formulas: gone, or $their source$.")
    code: Literal["drop", "keep"] = option("drop", help="Blocks of program code.")
    text_templates: tuple[str, ...] = option(
        (), help="Further templates that show one of their values, as NAME=NUMBER or NAME=KEY."
    )
    min_characters: int = option(0, help="Leave articles out whose clean text is shorter.")
    revision: bool = option(False, help="Add the fields revision and timestamp to records.")
    on_bad_page: Literal["fail", "skip"] = option(
        "fail", help="Stop at a page that cannot be read, or leave it out, count and list it."
    )
    list_dropped: int = option(
        1000, help="Pages left out, for each reason, that F.dropped.jsonl lists."
    )
    part_pages: int = option(
        10_000, help="Pages after which work is safe from a kill.", runtime=True
    )
    workers: int | None = option(
        None, help="Processes (default: by cores and size of the input).", runtime=True
    )

    @property
    def packing(self) -> str:
        """ ".gz", ".zst" or ""."""
        return "" if self.output.endswith(SUFFIXES[0]) else f".{self.output.rpartition('.')[2]}"

    @property
    def prefix(self) -> str:
        """The output without its suffixes: what other files are named after."""
        for suffix in SUFFIXES:
            if self.output.endswith(suffix):
                return self.output.removesuffix(suffix)
        return self.output

    def problems(self) -> Iterator[Problem]:
        if not self.input:
            yield Problem("input", self.input, "names no file")
        if not self.output.endswith(SUFFIXES) or not ends_in_name(self.prefix):
            nearest = f"Nearest: {self.prefix.rstrip('/.') or 'wikipedia'}.jsonl."
            rule = f"must be a file name ending in {', '.join(SUFFIXES[:2])} or {SUFFIXES[2]}"
            yield Problem("output", self.output, rule, nearest)
        if not self.namespaces:
            yield Problem("namespaces", self.namespaces, "names none", "Articles: 0.")
        for entry in self.text_templates:
            name, equals, value = entry.rpartition("=")
            if not equals or not name.strip() or not value.strip():
                rule = "must be NAME=NUMBER or NAME=KEY"
                yield Problem("text_templates", entry, rule, "Example: nowrap=1.")
        for name, least in (("min_characters", 0), ("list_dropped", 0), ("part_pages", 1)):
            if getattr(self, name) < least:
                rule = f"must be at least {least}"
                yield Problem(name, getattr(self, name), rule, f"Nearest: {least}.")
        if self.workers is not None and self.workers < 1:
            yield Problem("workers", self.workers, "must be at least 1", "Nearest: 1.")
