"""Wikitext to plain text: every step in the order in which MediaWiki itself takes it.

Own code beside mwparserfromhell and gensim's ``filter_wiki``: the former builds a tree and is
several times slower, and both leave what a reader does not see (docs/wikipedia.md has figures).
"""

from __future__ import annotations

from dataclasses import dataclass

from mtk.curation.wikipedia.elements import strip_elements
from mtk.curation.wikipedia.inline import strip_magic, strip_quotes, strip_tags
from mtk.curation.wikipedia.lines import clean_lines, sections_of, without_dropped, without_empty
from mtk.curation.wikipedia.links import LinkRules, resolve_links
from mtk.curation.wikipedia.marks import without_marks
from mtk.curation.wikipedia.tables import drop_tables
from mtk.curation.wikipedia.template_text import handlers
from mtk.curation.wikipedia.templates import expand_templates


@dataclass(frozen=True)
class TextRules:
    """What is kept of a page. dropped_sections: headings in lower case. templates: see
    :func:`mtk.curation.wikipedia.template_text.handlers`."""

    links: LinkRules
    language: str = "en"
    dropped_sections: frozenset[str] = frozenset()
    headings: bool = True
    keep_math: bool = False
    keep_code: bool = False
    templates: tuple[str, ...] = ()


def plain_text(wikitext: str, title: str, rules: TextRules) -> str:
    """Paragraphs and headings with an empty line between them, list items a line each."""
    text = without_marks(wikitext).replace("\r\n", "\n")
    text = strip_elements(text, keep_math=rules.keep_math, keep_code=rules.keep_code)
    text = expand_templates(text, handlers(title, rules.language, rules.templates))
    text = drop_tables(text)
    text = resolve_links(text, rules.links)
    text = strip_magic(strip_quotes(strip_tags(text)))
    sections = list(without_dropped(sections_of(text), rules.dropped_sections))
    for section in sections:
        section.lines = clean_lines(section.lines)
    blocks: list[str] = []
    for section in without_empty(sections):
        if section.heading and rules.headings:
            blocks.append(section.heading)
        if section.lines:
            blocks.append("\n".join(section.lines).strip("\n"))
    return "\n\n".join(blocks)
