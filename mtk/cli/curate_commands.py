"""``mtk curate wikitext``: what the Wikipedia stage would make of a page."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    del app
    parents["curate"].command("wikitext", help="Show the clean text of one page's wikitext.")(
        _wikitext
    )


def _wikitext(
    file: Annotated[str, typer.Argument(help="A file with wikitext, or - for standard input.")],
    title: Annotated[str, typer.Option(help="The page's title.")] = "",
    language: Annotated[str, typer.Option(help="Of the wiki, as en or de.")] = "en",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of mtk curate wikipedia as name=value."),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON line on stdout instead of the text.")
    ] = False,
) -> None:
    from mtk.config import resolve
    from mtk.config.curate_wikipedia import CurateWikipediaConfig
    from mtk.config.files import set_layer
    from mtk.curation.wikipedia.site import Site
    from mtk.curation.wikipedia.text import plain_text
    from mtk.curation.wikipedia.words import words_of
    from mtk.log import Reporter
    from stages.curate_wikipedia import text_rules

    fixed = set_layer(["input=['-']", "output=page.jsonl"])
    config = resolve(CurateWikipediaConfig, [fixed, set_layer(set_ or [])]).config
    rules = text_rules(config, Site(language=language), words_of(language))
    text = plain_text(_content(file), title, rules)
    Reporter(json_lines=json_).result(text, title=title, text=text)


def _content(file: str) -> str:
    from mtk.errors import DataError

    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
