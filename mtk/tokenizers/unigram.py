"""Unigram vocabulary by expectation-maximisation and pruning (Kudo 2018, arXiv:1804.10959).

The trainer of the ``tokenizers`` library walks a randomly seeded hash map, so that two
runs over one corpus give different scores and now and then different pieces. This one
visits words in sorted order; its result is run by the library's Unigram model.

Time grows with the number of *different* words: about 40 microseconds a word and pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

LONGEST_PIECE = 16
LONGEST_WORD = 32  # longer ones are cut for training: products of probabilities stay in range
MOST_WORDS = 500_000
SEEDS_PER_PIECE = 8
KEPT_PER_ROUND = 0.75
PASSES_PER_ROUND = 2

Words = Sequence[tuple[str, int]]
Scores = dict[str, float]


def train_unigram(counts: Mapping[str, int], alphabet: Sequence[str], size: int) -> Scores:
    """Piece -> log probability for at most ``size`` pieces, the whole alphabet among them.

    counts: how often each word occurs. Fewer pieces come back if the words hold no more.
    """
    words = _cut(counts)
    scores = _seeds(words, alphabet, size * SEEDS_PER_PIECE)
    while True:
        for _ in range(PASSES_PER_ROUND):
            scores = _maximise(_expect(words, scores), alphabet)
        if len(scores) <= size:
            return scores
        scores = _prune(words, scores, alphabet, size)


def _cut(counts: Mapping[str, int]) -> Words:
    cut: Counter[str] = Counter()
    for word, count in counts.items():
        for start in range(0, len(word), LONGEST_WORD):
            cut[word[start : start + LONGEST_WORD]] += count
    frequent = sorted(cut.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS]
    return sorted(frequent)


def _seeds(words: Words, alphabet: Sequence[str], most: int) -> Scores:
    """The alphabet and the substrings that cover most text, by frequency times length."""
    found: Counter[str] = Counter()
    for word, count in words:
        for start in range(len(word)):
            for end in range(start + 2, min(start + LONGEST_PIECE, len(word)) + 1):
                found[word[start:end]] += count
    candidates = [(count * len(piece), piece) for piece, count in found.items() if count > 1]
    candidates.sort(key=lambda item: (-item[0], item[1]))
    weights = {piece: float(weight) for weight, piece in candidates[:most]}
    singles: Counter[str] = Counter(dict.fromkeys(alphabet, 1))
    for word, count in words:
        for character in word:
            singles[character] += count
    return _normalised({character: float(singles[character]) for character in alphabet} | weights)


def _normalised(weights: Mapping[str, float]) -> Scores:
    total = math.log(math.fsum(weights.values()))
    return {piece: math.log(weight) - total for piece, weight in sorted(weights.items())}


def _expect(words: Words, scores: Scores) -> dict[str, float]:
    """Expected number of uses of each piece over all segmentations (forward-backward)."""
    probability = {piece: math.exp(score) for piece, score in scores.items()}
    expected = dict.fromkeys(scores, 0.0)
    for word, count in words:
        length = len(word)
        forward = [1.0] + [0.0] * length
        edges: list[tuple[int, int, str, float]] = []
        for start in range(length):
            reached = forward[start]
            for end in range(start + 1, min(start + LONGEST_PIECE, length) + 1):
                piece = word[start:end]
                p = probability.get(piece)
                if p is not None:
                    forward[end] += reached * p
                    edges.append((start, end, piece, p))
        backward = [0.0] * length + [count / forward[length]]
        for start, end, piece, p in reversed(edges):
            flow = p * backward[end]
            backward[start] += flow
            expected[piece] += forward[start] * flow
    return expected


def _maximise(expected: Mapping[str, float], alphabet: Sequence[str]) -> Scores:
    """New scores; pieces used less than half a time are dropped, the alphabet never is."""
    weights = {piece: weight for piece, weight in expected.items() if weight >= 0.5}
    for character in alphabet:
        weights[character] = max(expected.get(character, 0.0), 0.5)
    return _normalised(weights)


def _prune(words: Words, scores: Scores, alphabet: Sequence[str], size: int) -> Scores:
    """Keep the pieces whose absence would cost most likelihood."""
    expected = _expect(words, scores)
    singles = set(alphabet)
    costs = []
    for piece, score in scores.items():
        if piece not in singles:
            costs.append((expected[piece] * (score - _without(piece, scores)), piece))
    costs.sort(key=lambda item: (-item[0], item[1]))
    kept = max(size, int(len(scores) * KEPT_PER_ROUND)) - len(singles)
    names = singles | {piece for _, piece in costs[:kept]}
    return {piece: score for piece, score in scores.items() if piece in names}


def _without(piece: str, scores: Scores) -> float:
    """Log probability of the best segmentation of ``piece`` into other pieces (Viterbi)."""
    best = [0.0] + [-math.inf] * len(piece)
    for start in range(len(piece)):
        for end in range(start + 1, len(piece) + 1):
            score = scores.get(piece[start:end])
            if score is not None and end - start < len(piece):
                best[end] = max(best[end], best[start] + score)
    return best[-1]
