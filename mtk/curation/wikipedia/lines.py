"""Lines and sections: headings, lists, what stands under a heading, gaps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from mtk.curation.wikipedia.inline import decode_entities
from mtk.curation.wikipedia.marks import GONE, unveiled

_HEADING = re.compile(r"(={1,6})(.+?)\1\s*")
_LIST = re.compile(r"[*#:;]+\s*")
_RULE = re.compile(r"-{4,}")
_ODD = r"\t\u00a0\u2000-\u200b\u202f\u3000\ufeff\u00ad"
_SPACES = re.compile(rf" [ {_ODD}]+|[{_ODD}][ {_ODD}]*")  # more than one plain space
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OPENING, _CLOSING = ("(", "（"), (")", "）")
_COMMAS = (",", ";", "，", "、")
_BESIDE_BRACKETS = " \t,;:、，；"
_NO_SPACE_BEFORE = (*",.;:)]!?’”»、。，；：）",)


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
        line = _without_gaps(line)
    line = line.strip()
    if "&" not in line and "  " not in line and line.isprintable():
        return line
    line = _CONTROL.sub("", _SPACES.sub(" ", decode_entities(line)))
    return unveiled(line).rstrip()


def _without_gaps(line: str) -> str:
    """Brackets that held only what is gone go too, and so do spaces before punctuation."""
    first, *rest = line.split(GONE)
    out = [first]
    spaced = False
    for piece in rest:
        left, right = out[-1].rstrip(" \t"), piece.lstrip(" \t")
        spaced = spaced or left != out[-1] or right != piece
        out[-1] = left
        if right.startswith(_CLOSING) or left.endswith(_OPENING):
            out[-1], right = _in_brackets(left, right)
        elif left.endswith(_COMMAS) and right.startswith(_COMMAS):
            right = right[1:] if right[1:].strip() else ""
        elif right and left and spaced and not right.startswith(_NO_SPACE_BEFORE):
            out.append(" ")
        if right:
            out.append(right)
            spaced = False
    return "".join(out)


def _in_brackets(left: str, right: str) -> tuple[str, str]:
    if left.endswith(_OPENING):
        right = right.lstrip(_BESIDE_BRACKETS)
    else:
        left = left.rstrip(_BESIDE_BRACKETS)
    if left.endswith(_OPENING) and right.startswith(_CLOSING):
        return left[:-1].rstrip(" \t"), right[1:]
    return left, right
