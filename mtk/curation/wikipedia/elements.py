"""Comments, and XML-like elements whose content is not prose, in the order they are met.

MediaWiki looks for these before anything else: what stands in ``<nowiki>`` is never a template.
"""

from __future__ import annotations

import re

from mtk.curation.wikipedia.inline import decode_entities
from mtk.curation.wikipedia.marks import GONE, shown, verbatim
from mtk.curation.wikipedia.names import words

FORMULAS = frozenset(["math", "chem", "ce"])
CODE = frozenset(["syntaxhighlight", "source"])
_DROPPED = words(
    """ref references gallery timeline imagemap score templatedata templatestyles graph mapframe
    maplink hiero categorytree inputbox includeonly style script indicator ref-list
    dynamicpagelist listing rss embedvideo youtube section pagelist"""
)
_NAMES = sorted({*_DROPPED, *FORMULAS, *CODE, "nowiki", "pre"}, key=len, reverse=True)
_OPEN = re.compile(rf"<!--|<({'|'.join(_NAMES)})(?=[\s/>])([^<>]*?)(/?)>", re.IGNORECASE)
_CLOSE = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in _NAMES}
_REF = re.compile(r"<ref(?=[\s>])[^<>]*[^/<>]>|<ref>", re.IGNORECASE)


def strip_elements(text: str, *, keep_math: bool, keep_code: bool) -> str:
    """Comments go with the line they had to themselves; an element that never ends loses its
    tag only. Linear in the length of the text."""
    out: list[str] = []
    position = 0
    ends = _Ends(text)
    while (opened := _OPEN.search(text, position)) is not None:
        out.append(text[position : opened.start()])
        name = (opened[1] or "").lower()
        if not name:
            position = _comment_end(text, opened)
            continue
        position = opened.end()
        if opened[3]:
            out.append(GONE)
            continue
        closed = ends.after(name, position)
        if closed is None or (name == "ref" and _has_later_one(text, position, closed.start())):
            continue
        content = text[position : closed.start()]
        position = closed.end()
        out.append(_rendered(name, opened[2], content, keep_math=keep_math, keep_code=keep_code))
    out.append(text[position:])
    return "".join(out)


class _Ends:
    """The next closing tag of each name, looked for once for all openings before it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[str, re.Match[str] | None] = {}

    def after(self, name: str, position: int) -> re.Match[str] | None:
        known = name in self._found
        found = self._found.get(name)
        if not known or (found is not None and found.start() < position):
            found = self._found[name] = _CLOSE[name].search(self._text, position)
        return found


def _has_later_one(text: str, start: int, end: int) -> bool:
    """Whether another reference begins before the end, some paragraphs on: the end is its."""
    return text.find("\n\n", start, end) >= 0 and _REF.search(text, start, end) is not None


def _comment_end(text: str, opened: re.Match[str]) -> int:
    end = text.find("-->", opened.end())
    if end < 0:
        return len(text)
    end += len("-->")
    alone = opened.start() == 0 or text[opened.start() - 1] == "\n"
    return end + 1 if alone and text[end : end + 1] == "\n" else end


def _rendered(name: str, attributes: str, content: str, *, keep_math: bool, keep_code: bool) -> str:
    if name == "nowiki":
        return shown(decode_entities(content))
    if name == "pre":
        return verbatim(decode_entities(content).strip("\n"))
    if name in FORMULAS and keep_math:
        return verbatim(f"${' '.join(content.split())}$")
    if name in CODE and (keep_code or "inline" in attributes):
        return verbatim(content.strip("\n"))
    return GONE
