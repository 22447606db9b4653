"""Which tokens of which sequences are computed in the next step.

Every running sequence gets its one token, oldest first; what is left of the step's tokens goes to
prompts, cut into chunks, so that a long prompt does not hold up those who are reading. A
sequence begins when there are blocks for all it has so far. When a running one needs a block and
there is none, the youngest loses its own and waits at the head of the queue: its text is read
again later, from what the pool still knows of it if possible. The oldest is never stopped, so
that something always ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.generation import RunningSequence
from serving.paged.blocks import BlockPool, Table
from serving.paged.lookup import Lookup
from serving.requests import TokenLogprob
from serving.sampling import Choice


@dataclass(eq=False)
class Row:
    """A sequence on its way. Numbers count tokens.

    ids: all that are known. slot: its place on the device while it runs. cached: keys and values
    computed, or on their way. asked: new tokens sampled, or on their way. target: up to where its
    text is read before the first of them. in_flight: steps not looked at yet. begun: how often it
    got a slot. ended: nothing of it is wanted any more. lookup: makes its guesses, if it may have
    any. draft: guesses that its step computes behind its own token. drawn: choices made for tokens
    that are not taken yet. told: whether the device has its last token in its slot; the host has
    it otherwise.
    """

    sequence: RunningSequence
    table: Table
    age: int
    ids: list[int]
    slot: int | None = None
    cached: int = 0
    asked: int = 0
    target: int = 0
    in_flight: int = 0
    placed: int = 0
    begun: int = 0
    ended: bool = False
    scored: list[TokenLogprob] = field(default_factory=list)
    lookup: Lookup | None = None
    draft: tuple[int, ...] = ()
    drawn: list[Choice] = field(default_factory=list)
    told: bool = True

    @property
    def width(self) -> int:
        """Tokens that a step of decoding computes for it."""
        return 1 + len(self.draft)

    def draw(self) -> list[Choice]:
        """How each token of its step is to be chosen. Those of guesses stay: a place whose guess
        was wrong is chosen again, in the same way."""
        missing = self.width - len(self.drawn)
        self.drawn += [self.sequence.next_choice() for _ in range(missing)]
        choices = self.drawn[: self.width]
        if not self.draft:
            del self.drawn[0]
        return choices

    @property
    def reads(self) -> bool:
        """Whether part of its text is still to be read."""
        return self.cached < self.target

    @property
    def decodes(self) -> bool:
        """Whether a token can be computed for it now. One that depends on the last token waits
        until the host knows that."""
        late = self.in_flight > 0 and self.sequence.waits_for_last
        return not self.reads and self.asked < self.sequence.request.max_tokens and not late


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``start + count`` of a row's text. last: its next token follows."""

    row: Row
    start: int
    count: int

    @property
    def last(self) -> bool:
        return self.start + self.count == self.row.target


@dataclass(frozen=True)
class Step:
    """Rows that get one token, or more if they have guesses, and chunks of text to be read."""

    decode: Sequence[Row]
    chunks: Sequence[Chunk]

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


class Scheduler:
    """rows: sequences that run at once. tokens: computed in one step. window: chunks end at its
    multiples and count as one each, and a sequence begins when there are blocks for all it can
    become, as reading its tokens once more might round them differently."""

    def __init__(
        self, pool: BlockPool, *, rows: int, tokens: int, window: int | None = None
    ) -> None:
        if tokens <= rows:
            raise ValueError(f"{tokens} tokens a step leave nothing beside {rows} rows")
        self.pool, self._tokens, self._window = pool, tokens, window
        self.slots = list(range(rows - 1, -1, -1))
        self.running: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.preemptions = 0
        self._ages = 0

    def add(self, sequence: RunningSequence) -> Row:
        row = Row(sequence, Table(self.pool), self._ages, list(sequence.prompt))
        self._ages += 1
        self.waiting.append(row)
        return row

    @property
    def cached_tokens(self) -> int:
        return sum(row.cached for row in self.running)

    @property
    def blocked(self) -> bool:
        """Whether rows may have to lose their blocks while steps of theirs are on their way: those
        must be looked at first, as must guesses. Then the next step is planned."""
        if not any(row.in_flight for row in self.running):
            return False
        if any(row.draft for row in self.running):
            return True
        needed = sum(row.table.missing(row.cached + 1) for row in self.running if row.decodes)
        return needed > self.pool.available

    def plan(self, guess: Callable[[Sequence[Row], int], None] | None = None) -> Step:
        """The next step; its blocks are taken. Must not be called while :attr:`blocked`. guess:
        gives rows that decode their drafts, of so many tokens together at most."""
        decode = []
        for row in list(self.running):
            # An older one may have taken its blocks just now.
            if row.slot is not None and row.decodes and self._make_room(row):
                decode.append(row)
        if guess is not None:
            # A token is left for those who read.
            guess(decode, self._tokens - len(decode) - 1)
        chunks: list[Chunk] = []
        budget = self._tokens - sum(row.width for row in decode)
        reading = deque(row for row in self.running if row.reads)
        while budget > 0:
            reader = reading.popleft() if reading else self._next()
            if reader is None:
                break
            chunks.append(self._read(reader, budget))
            budget -= self._window or chunks[-1].count
        for row in decode:
            row.cached += row.width
        return Step(decode, chunks)

    def _read(self, row: Row, most: int) -> Chunk:
        if self._window is not None:
            most = self._window - row.cached % self._window
        chunk = Chunk(row, row.cached, min(row.target - row.cached, most))
        row.cached += chunk.count
        # Who begins alike finds them in this very step: keys are stored before any is read.
        row.table.publish(row.ids, row.cached)
        return chunk

    def _make_room(self, row: Row) -> bool:
        """Have a block for the row's next token, if need be a younger row's."""
        while row.table.missing(row.cached + 1) > self.pool.available:
            youngest = self.running[-1]
            if youngest is row:
                return False
            self._preempt(youngest)
        row.table.extend(row.cached + 1)
        return True

    def _preempt(self, row: Row) -> None:
        self._leave(row)
        row.cached = row.asked = row.target = 0
        self.waiting.appendleft(row)
        self.preemptions += 1

    def _next(self) -> Row | None:
        """The first of those that wait, if there is room for it."""
        if self.waiting and self.slots and self._begin(self.waiting[0]):
            return self.waiting.popleft()
        return None

    def _begin(self, row: Row) -> bool:
        """Give the row a slot and blocks for all its text, if there are enough."""
        table, ids = row.table, row.ids
        # Scores need the states of every token.
        scores = row.sequence.score_top is not None and not row.sequence.tokens
        found = 0 if scores else table.find(ids)
        # One that just lost its blocks must not take those that others need next.
        length, spare = len(ids), len(self.running)
        if self._window is not None:
            length, spare = length + row.sequence.request.max_tokens, 0
        if table.missing(length) + spare > self.pool.available:
            table.release()
            return False
        table.extend(length)
        if not scores:
            self.pool.asked += len(ids)
            self.pool.found += found
        row.slot, row.cached, row.target = self.slots.pop(), found, len(ids)
        row.asked, row.placed, row.scored = len(row.sequence.tokens), 0, []
        row.begun += 1
        self.running.append(row)
        self.running.sort(key=lambda other: other.age)
        return True

    @property
    def count(self) -> int:
        return len(self.running) + len(self.waiting)

    def drop(self, unwanted: Callable[[RunningSequence], bool]) -> None:
        """Free what all ``unwanted`` sequences hold."""
        for row in [row for row in self.running if unwanted(row.sequence)]:
            self.end(row)
        for row in [row for row in self.waiting if unwanted(row.sequence)]:
            row.ended = True
            self.waiting.remove(row)

    def end(self, row: Row, *, broken: bool = False) -> None:
        """Free what a running row holds; ``broken``: what it computed is not used again."""
        row.ended = True
        self._leave(row, forget=broken)

    def _leave(self, row: Row, *, forget: bool = False) -> None:
        assert row.slot is not None
        row.table.release(forget=forget)
        self.slots.append(row.slot)
        row.slot = None
        self.running.remove(row)
