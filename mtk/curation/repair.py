"""Text as its author meant it: mojibake undone, white space tidied."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from mtk.errors import ConfigError

Whitespace = Literal["lines", "spaces", "keep"]

# What ftfy cannot want to change: printable ASCII without "&" (an entity may begin there),
# tabs and line feeds.
_MAY_CHANGE = re.compile(r"[^\t\n\x20-\x25\x27-\x7e]")
_SPACES = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n{3,}")
_ANY_SPACES = re.compile(r"\s+")


def repairer() -> Callable[[str], str]:
    """ftfy's ``fix_text`` with its default options, of lines that it may change.

    Most lines of English text are plain ASCII, which ftfy reads slowly to no avail; the result
    is the same as of the whole text.
    """
    ftfy = _ftfy()
    plain: Any = ftfy.TextFixerConfig(explain=False)
    markup: Any = ftfy.TextFixerConfig(unescape_html=False, explain=False)

    def repair(text: str) -> str:
        if not _MAY_CHANGE.search(text):
            return text
        config = plain
        lines = text.split("\n")
        for index, line in enumerate(lines):
            if "<" in line:  # from the first sign of markup on ftfy leaves entities alone
                config = markup
            if _MAY_CHANGE.search(line):
                end = "\n" if index + 1 < len(lines) else ""
                fixed = ftfy.fix_text(line + end, config)
                lines[index] = fixed.removesuffix(end)
        return "\n".join(lines)

    return repair


def tidy_whitespace(text: str, how: Whitespace) -> str:
    """``lines``: single spaces, no spaces around line ends, at most one empty line. ``spaces``:
    every run of white space becomes one space, so that a page is one line. ``keep``: as is."""
    if how == "keep":
        return text
    if how == "spaces":
        return _ANY_SPACES.sub(" ", text).strip()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = _SPACES.sub(" ", text).split("\n")
    return _EMPTY_LINES.sub("\n\n", "\n".join(line.strip() for line in lines)).strip()


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError as error:
        message = "the repair of text needs the package ftfy: pip install 'mtk[curate]'."
        raise ConfigError(message) from error
    return ftfy
