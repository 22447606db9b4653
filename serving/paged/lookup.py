"""What may come next in a text, by what followed the same tokens in it before.

Answers repeat their question: names, code that is changed, passages that are quoted. Where the
last few tokens stood earlier in the text, what followed them there is a guess at what follows now
(prompt lookup decoding, Saxena 2023). The ends of all runs of ``shortest`` tokens are kept in
chains, one for each run, as in LZ77's matchers; a guess goes on like the place it was found at
until a token proves it wrong, and may run into itself, so that a text of one period is guessed
without end.

Guesses are compared with what comes whether or not anybody computed with them: a sequence whose
guesses are bad is known before it costs anything. Host only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.paged.step_cost import HOST, StepCost

# Places looked at for the longest run in common; the latest first.
MOST_PLACES = 8
# How much the newest guess counts in the average of all.
NEWEST = 0.25
# Share of guesses that begin a passage that is copied, and of other tokens that are right at least.
COPIES, CHANCE = 0.02, 0.05


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """most: tokens guessed for a sequence in one step. longest, shortest: tokens that two places
    must have in common; of several places one with ``longest`` or the most is taken. entries:
    tokens of a step that has guesses, all sequences' own among them. cost: of steps; guesses are
    computed if they promise ``margin`` times the tokens for that cost that single ones are."""

    most: int = 15
    longest: int = 5
    shortest: int = 2
    entries: int = 32
    cost: StepCost = HOST
    margin: float = 1.05


class Lookup:
    """Guesses for one text. ids: all its tokens, which somebody else appends to; those of the
    first :meth:`advance` are read only, later ones are what guesses are measured by."""

    def __init__(self, ids: Sequence[int], settings: DraftSettings) -> None:
        self._ids, self._settings = ids, settings
        # Where each run of tokens ended last, and for every end where it did before that; 0 is
        # nowhere.
        self._last: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []
        self._source: int | None = None
        self._right = 0
        self._average = 0.0

    @property
    def matched(self) -> bool:
        """Whether there is a guess."""
        return self._source is not None

    @property
    def expected(self) -> float:
        """How many tokens of a guess of ``most`` may be right: the average of those before it, or
        as many more as have been right already, the likelier the less chance explains them."""
        right, average = min(self._right, self._settings.most), self._average
        if right <= average:
            return average
        chance = max(CHANCE, average / (1 + average)) ** right
        copies = COPIES / (COPIES + chance)
        return copies * right + (1 - copies) * average

    @property
    def length(self) -> int:
        """Tokens worth guessing: twice what is expected, so that it may turn out to be more."""
        return min(self._settings.most, int(2 * self.expected) + 1)

    def advance(self) -> None:
        """Look at the tokens that came since the last call."""
        seen = len(self._before)
        if seen == 0:
            self._remember(0, len(self._ids))
        else:
            for end in range(seen + 1, len(self._ids) + 1):
                self._compare(self._ids[end - 1])
                self._remember(end - 1, end)
        if self._source is None and self._ids:
            self._source = self._find(len(self._ids))

    def draft(self, count: int) -> list[int]:
        """``count`` tokens that may come next, none without a guess."""
        if self._source is None:
            return []
        known, made = len(self._ids), list[int]()
        for place in range(self._source, self._source + count):
            made.append(self._ids[place] if place < known else made[place - known])
        return made

    def _compare(self, token: int) -> None:
        if self._source is None:
            # Nobody asked while it came.
            self._source = self._find(len(self._before))
        if self._source is None:
            return
        most = self._settings.most
        if self._ids[self._source] == token:
            self._source += 1
            self._right += 1
            if self._right % most == 0:
                self._learn(most)
        else:
            self._learn(self._right % most)
            self._source, self._right = None, 0

    def _learn(self, right: int) -> None:
        self._average += NEWEST * (right - self._average)

    def _remember(self, start: int, end: int) -> None:
        """Take the ends ``start + 1`` to ``end`` into the chains."""
        size = self._settings.shortest
        short = max(0, min(end, size - 1) - start)
        self._before += [0] * short
        first = max(0, start + 1 - size)
        tokens = self._ids[first:end]
        for place, run in enumerate(zip(*(tokens[i:] for i in range(size)), strict=False)):
            self._before.append(self._last.get(run, 0))
            self._last[run] = first + place + size

    def _find(self, end: int) -> int | None:
        """The place before ``end`` with the longest run in common, the latest of several."""
        best, length = None, 0
        place = self._before[end - 1]
        for _ in range(MOST_PLACES):
            if not place or length >= self._settings.longest:
                break
            common = self._common(place, end)
            if common > length:
                best, length = place, common
            place = self._before[place - 1]
        return best

    def _common(self, place: int, end: int) -> int:
        ids, size = self._ids, self._settings.shortest
        while (
            size < self._settings.longest
            and size < place
            and ids[place - size - 1] == ids[end - size - 1]
        ):
            size += 1
        return size
