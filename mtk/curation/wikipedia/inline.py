"""What is left inside lines: HTML tags, bold and italics, magic words, entities."""

from __future__ import annotations

import html
import re
from html.entities import html5

from mtk.curation.wikipedia.marks import GONE
from mtk.curation.wikipedia.names import words
from mtk.curation.wikipedia.superscript import superscript

_BLOCKS = words(
    """p div br hr li ul ol dl dd dt blockquote center h1 h2 h3 h4 h5 h6 tr td th caption poem
    article aside nav header footer figure figcaption"""
)
_INLINE = words(
    """abbr b bdi bdo big cite code data del dfn em font i ins kbd mark q rb rp rt rtc ruby s
    samp small span strike strong sub sup time tt u var wbr a img includeonly noinclude
    onlyinclude nowiki pre ref references math chem ce gallery section table tbody thead tfoot
    source syntaxhighlight templatestyles timeline imagemap score includeonly languages
    translate tvar link meta nobr poem hiero charinsert indicator phonos"""
)
_TAG = re.compile(
    rf"</?({'|'.join(sorted({*_BLOCKS, *_INLINE}, key=len, reverse=True))})(?:[\s/][^<>]*)?>",
    re.IGNORECASE,
)
_RAISED = re.compile(r"<sup(?:\s[^<>]*)?>([^<>]*)</sup\s*>", re.IGNORECASE)
_HIDDEN = re.compile(r"<(span|div)\s[^<>]*display\s*:\s*none[^<>]*>[^<>]*</\1\s*>", re.IGNORECASE)
_READINGS = re.compile(r"<r[tp](?:\s[^<>]*)?>[^<>]*</r[tp]\s*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_QUOTES = re.compile(r"'{2,}")
_WORDS = words(
    """NOTOC FORCETOC TOC NOEDITSECTION NEWSECTIONLINK NONEWSECTIONLINK NOGALLERY HIDDENCAT
    EXPECTUNUSEDCATEGORY NOCONTENTCONVERT NOCC NOTITLECONVERT NOTC INDEX NOINDEX
    STATICREDIRECT DISAMBIG START END NOGLOBAL ARCHIVEDTALK NOTALK EXPECTEDUNUSEDTEMPLATE
    EXPECTWITHOUTSCANS"""
)
_MAGIC = re.compile(rf"__(?:{'|'.join(_WORDS)})__")
_MAGIC_LINE = re.compile(r"^[ \t]*__(?![ _])[^\W\d](?:[^\W\d]|[ _])*__[ \t]*$", re.MULTILINE)
_VARIANTS = re.compile(r"-\{([^{}]*)\}-")


def strip_tags(text: str) -> str:
    """Blocks end lines, other tags vanish; what is no tag of wikis (``<stdio.h>``) stays."""
    if "<" not in text:
        return text
    text = _HIDDEN.sub(GONE, text)
    text = _RAISED.sub(lambda found: superscript(found[1]), text)
    text = _READINGS.sub("", text)
    return _TAG.sub(lambda found: "\n" if found[1].lower() in _BLOCKS else "", text)


def strip_magic(text: str) -> str:
    """Behaviour switches, of other languages where they have a line to themselves, and
    the variants of one spelling (``-{zh-hans:x;zh-hant:y}-``: the first)."""
    if "__" in text:
        text = _MAGIC_LINE.sub(_unless_code, _MAGIC.sub("", text))
    if "-{" in text:
        text = _VARIANTS.sub(lambda found: _variant(found[1]), text)
    return text


def _unless_code(found: re.Match[str]) -> str:
    return "" if found[0].isupper() else found[0]


def _variant(content: str) -> str:
    flags, bar, rest = content.partition("|")
    if bar:
        if "T" in flags or "H" in flags:
            return ""
        content = rest
    first = content.split(";")[0]
    code, colon, value = first.partition(":")
    return value.strip() if colon and code.strip().startswith("zh") else content


def strip_quotes(text: str) -> str:
    """Bold and italics. In a line where both are odd in number one bold mark is an apostrophe
    and an italic mark: ``l'''amour''``."""
    if "''" not in text:
        return text
    return "\n".join(_unquoted(line) if "''" in line else line for line in text.split("\n"))


def _unquoted(line: str) -> str:
    marks = list(_QUOTES.finditer(line))
    sizes = [_size(len(mark[0])) for mark in marks]
    if sum(s in (2, 5) for s in sizes) % 2 and sum(s in (3, 5) for s in sizes) % 2:
        split = _apostrophe(line, marks, sizes)
        if split is not None:
            sizes[split] = 2
    out, position = [], 0
    for mark, size in zip(marks, sizes, strict=True):
        out += [line[position : mark.start()], "'" * (len(mark[0]) - size)]
        position = mark.end()
    return "".join([*out, line[position:]])


def _size(length: int) -> int:
    """How many of the apostrophes are markup: 2, 3 or 5."""
    return 2 if length == 2 else 3 if length < 5 else 5


def _apostrophe(line: str, marks: list[re.Match[str]], sizes: list[int]) -> int | None:
    """Which bold mark to split: behind a word of one letter, else of several, else a space."""
    found: dict[int, int] = {}
    for index, mark in enumerate(marks):
        if sizes[index] == 3:
            before = line[max(0, mark.start() - 2) : mark.start()].rjust(2)
            rank = 2 if before[1] == " " else 0 if before[0] == " " else 1
            found.setdefault(rank, index)
    return found[min(found)] if found else None


def decode_entities(text: str) -> str:
    """Those with a semicolon, as MediaWiki does; unknown names stay."""
    return _ENTITY.sub(_decoded, text) if "&" in text else text


def _decoded(found: re.Match[str]) -> str:
    entity = found[0]
    known = entity[1] == "#" or entity[1:] in html5
    return html.unescape(entity) if known else entity
