r"""Undo the tokenisation of published test sets, by Megatron-LM's rules.

WikiText and Penn Treebank come with spaces around punctuation and special marks
(``@-@``); models are trained on ordinary text, so those are removed before scoring. The
rules, their order and their oddities are part of the published numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from mtk.errors import DataError

Detokenizer = Literal["wikitext", "ptb", "none"]

_WIKITEXT_MARKS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
# Up to the first closing character; inner spaces at the edges go.
_ENCLOSED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_WIKITEXT_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_PTB = (
    (" '", "'"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" n't", "n't"),
    (" N ", "1 "),
    ("$ 1", "$1"),
    ("# 1", "#1"),
)


def wikitext(text: str) -> str:
    """Ordinary text from WikiText's."""
    for old, new in _WIKITEXT_MARKS:
        text = text.replace(old, new)
    for pattern, replacement in _ENCLOSED:
        text = re.sub(pattern, replacement, text)
    for old, new in _WIKITEXT_REST:
        text = text.replace(old, new)
    return text


def ptb(text: str) -> str:
    """Ordinary text from the Penn Treebank's."""
    for old, new in _PTB:
        text = text.replace(old, new)
    return text


def choose(path: str) -> Detokenizer:
    """The rules for a file by its path, tried in Megatron's order: ptb, wiki, else none."""
    if "ptb" in path:
        return "ptb"
    return "wikitext" if "wiki" in path else "none"


def choose_all(paths: Sequence[str], asked: Detokenizer | Literal["auto"]) -> Detokenizer:
    """The rules that are asked for, or those that all paths suggest. Raises DataError if they do
    not suggest the same."""
    rules: set[Detokenizer] = {choose(path) if asked == "auto" else asked for path in paths}
    if len(rules) > 1:
        raise DataError(
            f"the paths of --valid-data suggest different detokenizers "
            f"({', '.join(sorted(rules))}). Evaluate the files apart, or choose one with "
            f"--detokenizer."
        )
    return rules.pop()


def detokenize(text: str, kind: Detokenizer) -> str:
    """``text`` after the rules of ``kind``; LAMBADA and ordinary files need none."""
    if kind == "wikitext":
        return wikitext(text)
    return ptb(text) if kind == "ptb" else text
