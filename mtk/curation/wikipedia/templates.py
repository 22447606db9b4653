"""Templates in any nesting, as MediaWiki's preprocessor pairs their braces.

A template's text lives on another page, so most are taken out whole; those that only dress
up a text they carry are replaced by it (:mod:`mtk.curation.wikipedia.template_text`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mtk.curation.wikipedia.marks import GONE

DEEPEST = 40  # as in MediaWiki
_BRACES = re.compile(r"\{\{+|\}\}+")
_BRACKETS = re.compile(r"\[\[|\]\]|\|")
_NAME = re.compile(r"[\w .\-']{1,80}")


@dataclass(frozen=True)
class Call:
    """``{{name|a|b|key=c}}``: name in lower case, without ``_``; values stripped, unnamed ones
    by "1", "2", ..."""

    name: str
    values: Mapping[str, str]

    def get(self, *keys: str) -> str:
        """The first of the values that is there and not empty, else ""."""
        return next((self.values[key] for key in keys if self.values.get(key)), "")

    def unnamed(self, first: int = 1) -> list[str]:
        """Values without a name from number ``first`` on."""
        found = []
        while (value := self.values.get(str(first))) is not None:
            found.append(value)
            first += 1
        return found


Handler = Callable[[Call], str]


@dataclass
class _Open:
    """Braces that wait for their end, and what came behind them."""

    count: int
    pieces: list[str] = field(default_factory=list)


def expand_templates(text: str, handlers: Mapping[str, Handler]) -> str:
    """Every template replaced by what its handler says, or by a mark that something is gone.

    Braces without a partner: their template ends with the line, or with its last parameter.
    """
    stack = [_Open(0)]
    position = 0
    for found in _BRACES.finditer(text):
        stack[-1].pieces.append(text[position : found.start()])
        position = found.end()
        count = len(found[0])
        if found[0][0] == "{":
            stack.append(_Open(count))
        else:
            _close(stack, count, handlers)
    stack[-1].pieces.append(text[position:])
    while len(stack) > 1:
        top = stack.pop()
        stack[-1].pieces.append(_without_call("".join(top.pieces)))
    return "".join(stack[0].pieces)


def _close(stack: list[_Open], count: int, handlers: Mapping[str, Handler]) -> None:
    while count >= 2 and len(stack) > 1:
        top = stack[-1]
        used = 3 if top.count >= 3 and count >= 3 else 2
        inner = "".join(top.pieces)
        if len(stack) > DEEPEST:
            value = ""
        elif used == 3:
            value = inner.partition("|")[2]  # a parameter: its default
        else:
            value = _called(inner, handlers)
        top.count -= used
        count -= used
        if top.count >= 2:
            top.pieces = [value]
        else:
            stack.pop()
            stack[-1].pieces += ["{" * top.count, value]
    stack[-1].pieces.append("}" * count)


def _without_call(text: str) -> str:
    """What follows a template that never ends: lines of parameters are no text."""
    first, *lines = text.split("\n")
    start = 0
    while start < len(lines) and lines[start].lstrip().startswith("|"):
        start += 1
    # Inside a sentence the rest of the line is more likely to be text than a parameter.
    head = "" if start or "|" in first else first
    return "\n".join([head, *lines[start:]])


def _called(inner: str, handlers: Mapping[str, Handler]) -> str:
    name, bar, rest = inner.partition("|")
    name = normal_name(name)
    # lang-fr, lang-de, ...: one handler by the beginning.
    handler = handlers.get(name) or handlers.get(name[: name.find("-") + 1])
    if handler is not None:
        return handler(Call(name, arguments(rest) if bar else {}))
    function, colon, value = name.partition(":")
    if colon and (handler := handlers.get(f"{function.rstrip()}:")) is not None:
        value = inner.partition(":")[2]
        return handler(Call(function, arguments(f"1={value}")))
    return GONE


def normal_name(name: str) -> str:
    """As wikis tell template names apart, but without regard to case."""
    name = " ".join(name.replace(GONE, "").replace("_", " ").split()).lower()
    return name.removeprefix("template:").lstrip()


def arguments(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    number = 0
    for part in _parts(text):
        name, equals, value = part.partition("=")
        name = name.strip()
        if equals and _NAME.fullmatch(name):
            values[name] = value.strip()
        else:
            number += 1
            values[str(number)] = part.strip()
    return values


def _parts(text: str) -> list[str]:
    """Cut at bars that stand in no link."""
    if "[[" not in text:
        return text.split("|")
    parts, start, depth = [], 0, 0
    for found in _BRACKETS.finditer(text):
        if found[0] == "|":
            if not depth:
                parts.append(text[start : found.start()])
                start = found.end()
        else:
            depth = max(0, depth + (1 if found[0] == "[[" else -1))
    return [*parts, text[start:]]
