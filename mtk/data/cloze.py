"""Last-word passages in LAMBADA's schema (Paperno et al. 2016, arXiv:1606.06031).

A passage is some sentences whose last word occurred earlier in it, so that the context,
not only the last sentence, tells the word. Here they are cut from given prose by rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

FEWEST_WORDS = 20
MOST_WORDS = 90
MOST_PASSAGES = 400
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_LAST_WORD = re.compile(r"(?<=\s)([A-Za-z]{3,})[.!?]?$")
_CODE = re.compile(r">>>|[{}<>|\\]| = ")
_COMMON = (
    "that this with from have will them they then than when were been also only each such "
    "the and for not are its can has may any all one two but was you see set get self none "
    "true false used uses into must some other which about there their these those would could "
    "should"
)


def cloze_passages(texts: Iterable[str]) -> list[str]:
    """At most 400 passages, never two over the same sentence, in the order of the texts."""
    passages: list[str] = []
    for text in texts:
        for paragraphs in _prose(text):
            passages += _windows(paragraphs)
    return passages[:MOST_PASSAGES]


def _prose(text: str) -> Iterator[list[str]]:
    """Sentences of each stretch of running paragraphs; code ends a stretch, a heading (no
    full stop, or very short) is left out."""
    sentences: list[str] = []
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        if _CODE.search(line):
            if sentences:
                yield sentences
            sentences = []
        elif line.endswith((".", "!", "?")) and len(line) >= 30:
            sentences += _SENTENCE_END.split(line)
    if sentences:
        yield sentences


def _windows(sentences: list[str]) -> Iterator[str]:
    start = 0
    for end in range(1, len(sentences) + 1):
        words = sum(len(sentence.split()) for sentence in sentences[start:end])
        while words > MOST_WORDS and start < end:
            words -= len(sentences[start].split())
            start += 1
        if words >= FEWEST_WORDS and (passage := _passage(sentences[start:end])):
            yield passage
            start = end


def _passage(sentences: list[str]) -> str | None:
    """The sentences without their final full stop, if the last word was there before."""
    found = _LAST_WORD.search(sentences[-1])
    if found is None or found[1].lower() in _COMMON.split():
        return None
    word = found[1]
    text = " ".join(sentences)
    text = text[: len(text) - len(found[0]) + len(word)]
    before = text[: -len(word)]
    return text if re.search(rf"\b{re.escape(word)}\b", before) else None
