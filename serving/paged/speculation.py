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

from collections.abc import Iterable, Sequence

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
        if not rows or len(rows) >= self._settings.entries:
            return False
        return sum(self._expected(row) for row in rows) >= self._settings.worth * len(rows)

    def _expected(self, row: Row) -> float:
        lookup = row.lookup
        if lookup is None:
            return 0.0
        lookup.advance()
        left = row.sequence.request.max_tokens - row.asked - 1
        return min(lookup.expected, left) if lookup.matched else 0.0

    def draft(self, rows: Iterable[Row], room: int) -> None:
        """Give rows that are to decode their guesses, at most ``room`` tokens, and blocks for
        them, of which nobody loses any."""
        pool = self._scheduler.pool
        room = min(room, self._settings.entries - len(list(rows)))
        for row in rows:
            if row.lookup is None or row.in_flight or room < 1:
                continue
            blocks = len(row.table.blocks) + pool.available
            left = row.sequence.request.max_tokens - row.asked - 1
            most = min(room, left, blocks * pool.size - row.cached - 1)
            if most > 0:
                row.lookup.advance()
                row.draft = tuple(row.lookup.draft(most))
                row.table.extend(row.cached + 1 + len(row.draft))
                room -= len(row.draft)
                self.drafted += len(row.draft)

    def accept(self, row: Row, found: Sequence[Found]) -> Sequence[Found]:
        """What counts of all that a row's places have chosen; the row then goes on behind it."""
        right = right_part(row.draft, found)
        dropped = len(found) - len(right)
        self.accepted += len(right) - 1
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
