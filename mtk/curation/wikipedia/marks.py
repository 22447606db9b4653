"""Characters that stand for something while a page is cleaned.

Unicode sets 32 code points aside that no text may hold (noncharacters, U+FDD0 to U+FDEF). One
marks where something was taken out of a sentence, so that the gap can be closed; the others
stand for characters that were written to be shown (``<nowiki>``) and must not act as markup.
"""

from __future__ import annotations

import re

GONE = "\ufdd0"
_SHOWN = "[]{}|'<>&=*#:;_-~!$"
_SPACES = " \n\t"
_FIRST = 0xFDD1

_STANDS_FOR = {_FIRST + i: ord(c) for i, c in enumerate(_SHOWN + _SPACES)}
_HIDE_MARKUP = {ord(c): _FIRST + i for i, c in enumerate(_SHOWN)}
_HIDE_ALL = {ord(c): _FIRST + i for i, c in enumerate(_SHOWN + _SPACES)}
_MARKS = re.compile("[\ufdd0-\ufdef]")


def without_marks(text: str) -> str:
    """The text as it comes, in which none of the marks may stand."""
    return _MARKS.sub("", text)


def shown(text: str) -> str:
    """Text that is no markup, whatever it looks like."""
    return text.translate(_HIDE_MARKUP)


def verbatim(text: str) -> str:
    """The same, spaces and line ends included."""
    return text.translate(_HIDE_ALL)


def unveiled(text: str) -> str:
    """Every mark becomes what it stands for."""
    return text.translate(_STANDS_FOR) if _MARKS.search(text) else text
