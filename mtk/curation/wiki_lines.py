"""Lines and sections: headings, lists, what stands under a heading, gaps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from mtk.curation.wiki_inline import decode_entities
from mtk.curation.wiki_marks import GONE, unveiled

_HEADING = re.compile(r"(={1,6})(.+?)\1\s*")
_LIST = re.compile(r"[*#:;]+\s*")
_RULE = re.compile(r"-{4,}")
_SPACES = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u3000\u200b\ufeff\u00ad]+")
_EMPTY_BRACKETS = re.compile(rf"[ \t]*[(（][ \t,;:、，；]*{GONE}[ \t,;:、，；{GONE}]*[)）]")
_AFTER_OPENING = re.compile(rf"([(（])[ \t]*{GONE}[ \t,;:、，；{GONE}]*")
_BEFORE_CLOSING = re.compile(rf"[ \t,;:、，；]*{GONE}[ \t{GONE}]*([)）])")
_GAP = re.compile(rf"([ \t]*){GONE}([ \t{GONE}]*)(?=(.?))", re.DOTALL)
_CONTROL = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)])
_NO_SPACE_BEFORE = frozenset(",.;:)]!?’”»、。，；：）")


@dataclass
class Section:
    """level: 0 for what comes before the first heading."""

    level: int
    heading: str
    lines: list[str] = field(default_factory=list)


def sections_of(text: str) -> list[Section]:
    found = [Section(0, "")]
    for line in text.split("\n"):
        heading = _HEADING.fullmatch(line) if line.startswith("=") else None
        if heading is None and line.startswith("=") and GONE in line:
            heading = _HEADING.fullmatch(line.replace(GONE, "").rstrip())
        if heading is not None and heading[2].strip():
            found.append(Section(len(heading[1]), closed_gaps(heading[2])))
        else:
            found[-1].lines.append(line)
    return found


def without_dropped(sections: list[Section], names: frozenset[str]) -> Iterator[Section]:
    """Sections with one of the names (lower case) go, with those below them."""
    inside = 0  # level of the section being dropped
    for section in sections:
        if inside and section.level > inside:
            continue
        inside = section.level if section.heading.strip(" :.").lower() in names else 0
        if not inside:
            yield section


def without_empty(sections: list[Section]) -> list[Section]:
    """Headings go that stand over nothing, neither text nor sections with text."""
    kept: list[Section] = []
    below = 0  # level of the nearest kept section behind
    for section in reversed(sections):
        if any(section.lines) or (below and section.level < below):
            kept.append(section)
            below = section.level
        elif below and section.level >= below:
            continue
    return kept[::-1]


def clean_lines(lines: list[str]) -> list[str]:
    """Without list markers, rules and remains of tables; no empty lines in a row."""
    kept: list[str] = []
    for line in lines:
        line = _clean_line(line)
        if line or (kept and kept[-1]):
            kept.append(line)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _clean_line(line: str) -> str:
    line = line.strip()
    if not line:
        return ""
    marker = _LIST.match(line)
    if marker is not None:
        line = line[marker.end() :]
    elif line.startswith(("|", "{|", "!!")):
        return ""
    elif line.startswith("----"):
        line = _RULE.sub("", line, count=1)
    if GONE in line and not any(c.isalnum() for c in line):
        return ""
    return closed_gaps(line)


def closed_gaps(line: str) -> str:
    """The line as a reader sees it: what was taken out leaves no hole in the sentence."""
    if GONE in line:
        line = _EMPTY_BRACKETS.sub("", line)
        line = _AFTER_OPENING.sub(r"\1", line)
        line = _BEFORE_CLOSING.sub(r"\1", line)
        line = _GAP.sub(_closed, line)
    line = unveiled(decode_entities(_SPACES.sub(" ", line).strip()))
    if not line.isascii():
        line = "\n".join(_SPACES.sub(" ", part).rstrip() for part in line.split("\n"))
    return line.translate(_CONTROL)


def _closed(found: re.Match[str]) -> str:
    after = found[3]
    if not after or after in _NO_SPACE_BEFORE:
        return ""
    return " " if found[1] or found[2].strip(GONE) else ""
