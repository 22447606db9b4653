"""Cleaning a page and judging whether it is worth keeping.

The tasks are those of OpenWebText's cleanup tools. All repairs are made to every page, one
after another (the tools stopped after the first that applied), then the rules are asked in a
fixed order; the first that a page breaks is the reason that is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mtk.curation.languages import language_finder
from mtk.curation.pages import Page, Stretch
from mtk.curation.repair import Whitespace, repairer, tidy_whitespace
from mtk.curation.sifting import Judge, Sifted, Verdict, sift
from mtk.tokenizers import load_tokenizer

EMPTY, JAVASCRIPT, FEW_CHARS = "empty", "javascript notice", "too few characters"
FEW_TOKENS, LANGUAGE = "too few tokens", "other language"
REPAIRED, TIDIED = "repaired", "white space tidied"
CHARS_A_TOKEN = 8  # a text with this many characters a token has enough tokens, uncounted

_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class CleanPlan:
    """What is done to a page, and which are dropped; 0 or () turns a rule off.

    tokenizer: folder of one that counts tokens; "" counts words and signs.
    """

    key: str
    id_key: str
    repair: bool
    whitespace: Whitespace
    languages: tuple[str, ...]
    min_tokens: int
    min_chars: int
    javascript_chars: int
    tokenizer: str = ""

    def open(self) -> Callable[[Stretch], Sifted]:
        judge = clean_judge(self)
        return lambda stretch: sift(stretch, self.key, self.id_key, judge)


def clean_judge(plan: CleanPlan) -> Judge:
    """Loads what the plan needs. Raises ConfigError for a package that is not installed."""
    repair = repairer() if plan.repair else None
    refuse = _rules(plan)

    def judge(page: Page, number: int) -> Verdict:
        del number
        changes = []
        text = repair(page.text) if repair else page.text
        if text != page.text:
            changes.append(REPAIRED)
        tidied = tidy_whitespace(text, plan.whitespace)
        if tidied != text:
            changes.append(TIDIED)
        broken = refuse(tidied)
        if broken:
            return Verdict(reason=broken[0], detail=broken[1])
        line = page.changed(tidied) if changes else page.line()
        return Verdict((line,), changes=tuple(changes))

    return judge


def _rules(plan: CleanPlan) -> Callable[[str], tuple[str, str] | None]:
    """Text -> (reason, detail) of the first rule it breaks."""
    language = language_finder() if plan.languages else None
    count = _token_counter(plan.tokenizer)

    def refuse(text: str) -> tuple[str, str] | None:
        size = len(text)
        if not text.strip():
            return EMPTY, ""
        if size < plan.javascript_chars and "javascript" in text.lower():
            return JAVASCRIPT, f"{size} characters"
        if size < plan.min_chars:
            return FEW_CHARS, str(size)
        if size < CHARS_A_TOKEN * plan.min_tokens and (found := count(text)) < plan.min_tokens:
            return FEW_TOKENS, str(found)
        if language is not None and (code := language(text)) not in plan.languages:
            return LANGUAGE, code
        return None

    return refuse


def _token_counter(tokenizer: str) -> Callable[[str], int]:
    if not tokenizer:
        return lambda text: len(_PIECE.findall(text))
    encode = load_tokenizer(tokenizer).encode
    return lambda text: len(encode(text))
