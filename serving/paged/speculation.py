"""Steps that compute guessed tokens together with the next one.

A decode step mostly reads weights; a few more tokens in it cost little. A row with a guess computes
its own token and those guessed after it in one step, as if each were a row: keys and values of all
are stored before any is read, and each looks at what lies before it. Each place chooses its token
from its own logits, with the random number that the sequence has for that token. As long as the
token chosen is the one that was guessed, the next place has seen the right text and its choice
counts; the first other choice is the last that does (Leviathan et al. 2023, for guesses that are
certain). So what comes out is what single steps would choose, seeds included; what the wrong
guesses left in the cache lies behind the sequence's end and is written over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serving.paged.lookup import DraftSettings, Lookup
from serving.paged.results import Found
from serving.paged.schedule import Row, Scheduler


class Speculation:
    """Decides which rows compute guesses, and what of them was right. drafted, accepted: guessed
    tokens that were computed, and that were right, since the start."""

    def __init__(self, settings: DraftSettings, scheduler: Scheduler) -> None:
        self._settings, self._scheduler = settings, scheduler
        self.drafted = self.accepted = 0

    def join(self, row: Row) -> None:
        """A sequence begins. One whose choices depend on the text before them computes one token
        at a time."""
        if not row.sequence.waits_for_last:
            row.lookup = Lookup(row.ids, self._settings)

    def promising(self) -> bool:
        """Whether the next step should have guesses, for which all tokens must be known. Rows whose
        last token is on its way are judged by those before it."""
        rows = [row for row in self._scheduler.running if row.decodes]
        return bool(self._lengths(rows, self._settings.entries))

    def draft(self, rows: Sequence[Row], room: int) -> None:
        """Give rows that are to decode their guesses, at most ``room`` tokens, and blocks for
        them, of which nobody loses any."""
        pool = self._scheduler.pool
        for row, length in self._lengths(rows, room).items():
            assert row.lookup is not None
            blocks = len(row.table.blocks) + pool.available
            row.draft = tuple(row.lookup.draft(min(length, blocks * pool.size - row.cached - 1)))
            row.table.extend(row.cached + row.width)
            self.drafted += len(row.draft)

    def _lengths(self, rows: Sequence[Row], room: int) -> dict[Row, int]:
        """How many tokens to guess for which rows: as many of the best guesses as make tokens
        cheapest, if they are cheaper than without."""
        cost, count = self._settings.cost, len(rows)
        room = min(room, self._settings.entries - count)
        if not rows or room < 1:
            return {}
        offers = sorted(self._offers(rows), key=lambda offer: -offer[1])
        lengths, best = dict[Row, int](), dict[Row, int]()
        rate, right = self._settings.margin * count / cost.plain(count), 0.0
        for row, expected, length in offers:
            length = min(length, room)
            if length < 1:
                break
            lengths[row], room, right = length, room - length, right + min(expected, length)
            found = (count + right) / cost.guessed(count + sum(lengths.values()))
            if found >= rate:
                rate, best = found, dict(lengths)
        return best

    def _offers(self, rows: Sequence[Row]) -> Iterator[tuple[Row, float, int]]:
        """Rows with a guess, how many tokens of it may be right, and how many are worth trying."""
        for row in rows:
            lookup, left = row.lookup, row.sequence.request.max_tokens - row.asked - 1
            if lookup is None or left < 1:
                continue
            lookup.advance()
            if lookup.matched:
                yield row, lookup.expected, min(lookup.length, left)

    def accept(self, row: Row, found: Sequence[Found]) -> Sequence[Found]:
        """What counts of all that a row's places have chosen; the row then goes on behind it.
        Nothing does if one of them is not finite, as that may reach others: such a row goes on
        from where it was, without guesses."""
        right = right_part(row.draft, found)
        if any(one.token is None for one in found):
            right, row.lookup = [], None
        dropped = len(found) - len(right)
        self.accepted += max(0, len(right) - 1)
        row.draft = ()
        row.cached -= dropped
        row.asked -= dropped
        del row.drawn[: len(right)]
        return right


def right_part(draft: Sequence[int], found: Sequence[Found]) -> Sequence[Found]:
    """The choices of the first place, and of each one behind a guess that was chosen too."""
    right = 0
    while right < len(draft) and found[right].token == draft[right]:
        right += 1
    return found[: right + 1]
