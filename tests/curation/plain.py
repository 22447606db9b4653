"""The plainest correct versions of what mtk.curation does faster, in pure Python."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def shingles(text: str, width: int = 5) -> set[str]:
    return {text[i : i + width] for i in range(len(text) - width + 1)}


def word_shingles(text: str, width: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


def jaccard(first: set[object], second: set[object]) -> float:
    return len(first & second) / len(first | second) if first and second else 0.0


def firsts(number: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The first document of each one's group, by spreading the smallest number."""
    found = list(range(number))
    changed = True
    while changed:
        changed = False
        for one, other in pairs:
            low = min(found[one], found[other])
            if found[one] != low or found[other] != low:
                found[one] = found[other] = low
                changed = True
    return found


def evaluation_ngrams(texts: Sequence[str], shortest: int = 8, longest: int = 13) -> set[str]:
    """Joined by single spaces."""
    found: set[str] = set()
    for text in texts:
        words = [word.lower() for word in re.findall(r"\w+", text)]
        length = min(longest, len(words))
        if length >= shortest:
            found |= {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found


def places(text: str, ngrams: set[str]) -> list[tuple[int, int, str]]:
    """(first character, character behind the last, n-gram) of every match."""
    spans = [match.span() for match in re.finditer(r"\w+", text)]
    words = [text[start:end].lower() for start, end in spans]
    lengths = {ngram.count(" ") + 1 for ngram in ngrams}
    return [
        (spans[i][0], spans[i + n - 1][1], ngram)
        for i in range(len(words))
        for n in sorted(lengths, reverse=True)
        if i + n <= len(words) and (ngram := " ".join(words[i : i + n])) in ngrams
    ]


def cut(text: str, ngrams: set[str], margin: int, least: int) -> list[str]:
    """Megatron-LM's way: cut at the first match, keep the left piece, go on with the right."""
    found = places(text, ngrams)
    if not found:
        return [text.strip()] if len(text.strip()) > least else []
    start, end, _ = found[0]
    left = start - margin
    while left >= 0 and text[left] not in ".!?":
        left -= 1
    right = end + margin
    while right < len(text) and text[right] not in ".!?":
        right += 1
    piece = text[: left + 1].strip() if left >= 0 else ""
    return [piece] * (len(piece) > least) + cut(text[right + 1 :], ngrams, margin, least)


def frequent(texts: Sequence[str], ngrams: set[str], often: int) -> set[str]:
    counts = Counter(ngram for text in texts for _, _, ngram in places(text, ngrams))
    return {ngram for ngram, number in counts.items() if number >= often}
