"""Which pages are articles, by what the dump says about them and by their templates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from mtk.curation.wikipedia.elements import strip_elements
from mtk.curation.wikipedia.page import Page
from mtk.curation.wikipedia.site import Site
from mtk.curation.wikipedia.words import REDIRECTS, Words

_REDIRECT = re.compile(rf"\s*#(?:{'|'.join(map(re.escape, REDIRECTS))})\b[^\n]{{0,40}}?\[\[", re.I)


@dataclass(frozen=True)
class PageRules:
    """words: in lower case; see :class:`mtk.curation.wikipedia.words.Words`."""

    namespaces: frozenset[int]
    words: Words
    drop_disambiguations: bool = True
    drop_lists: bool = False


def why_dropped(page: Page, site: Site, rules: PageRules) -> str | None:
    """The reason, a short constant to count by; None for a page to keep."""
    if namespace_number(page, site) not in rules.namespaces:
        return "namespace"
    if page.redirect or ("#" in page.text[:20] and _REDIRECT.match(page.text)):
        return "redirect"
    if page.model not in ("", "wikitext"):
        return "not wikitext"
    if rules.drop_disambiguations and _is_disambiguation(page, rules.words):
        return "disambiguation"
    if rules.drop_lists and page.title.lower().startswith(rules.words.lists):
        return "list"
    return None


def namespace_number(page: Page, site: Site) -> int:
    try:
        return int(page.ns)
    except ValueError:  # dumps before 2012
        return site.namespace_of(page.title)


def _is_disambiguation(page: Page, words: Words) -> bool:
    title = page.title.lower()
    if title.endswith((")", "）")) and _last_brackets(title) in words.endings:
        return True
    marks = _templates(words.disambiguation)
    if "__DISAMBIG__" not in page.text and not marks.search(page.text):
        return False
    # Seldom: the words may stand in a comment, or be shown as they are.
    text = strip_elements(page.text, keep_math=False, keep_code=False)
    return "__DISAMBIG__" in text or marks.search(text) is not None


def _last_brackets(title: str) -> str:
    return re.split(r"[(（]", title[:-1])[-1].strip()


@lru_cache(maxsize=8)
def _templates(names: tuple[str, ...]) -> re.Pattern[str]:
    # Any of a name's spaces may be written as _, and in any number.
    either = "|".join(r"[\s_]+".join(map(re.escape, name.split())) for name in names)
    prefix = r"(?:template\s*:\s*)?"
    return re.compile(rf"\{{\{{[\s_]*{prefix}(?:{either})[\s_]*(?:\||\}}\}})", re.IGNORECASE)
