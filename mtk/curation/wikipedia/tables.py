"""Tables, in wiki and in HTML syntax, taken out whole."""

from __future__ import annotations

import re

_WIKI = re.compile(r"^[ \t:*#;]*\{\||^[ \t]*\|\}", re.MULTILINE)
_HTML = re.compile(r"<(/?)table\b[^<>]*>", re.IGNORECASE)
_HEADING = re.compile(r"^==", re.MULTILINE)


def drop_tables(text: str) -> str:
    """A table that never ends is taken to end before the next heading."""
    if "{|" in text:
        text = _without(text, [(m.start(), m.end(), "{" in m[0]) for m in _WIKI.finditer(text)])
    if "<table" in text or "<TABLE" in text or "<Table" in text:
        text = _without(text, [(m.start(), m.end(), not m[1]) for m in _HTML.finditer(text)])
    return text


def _without(text: str, borders: list[tuple[int, int, bool]]) -> str:
    """borders: (start, end, whether a table opens there), in order."""
    out: list[str] = []
    partners = _partners(borders)
    kept = 0  # everything before is dealt with
    index = 0
    while index < len(borders):
        start, _, opens = borders[index]
        if not opens:
            index += 1  # an end without a beginning: the lines see to it
            continue
        last = partners.get(index)
        out.append(text[kept:start])
        if last is None:
            heading = _HEADING.search(text, start)
            kept = heading.start() if heading else len(text)
        else:
            kept = borders[last][1]
        while index < len(borders) and borders[index][0] < kept:
            index += 1
    return "".join([*out, text[kept:]])


def _partners(borders: list[tuple[int, int, bool]]) -> dict[int, int]:
    """Of every beginning that has one: its end."""
    waiting: list[int] = []
    found: dict[int, int] = {}
    for index, (_, _, opens) in enumerate(borders):
        if opens:
            waiting.append(index)
        elif waiting:
            found[waiting.pop()] = index
    return found
