"""Sequences that run together on a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mtk.models.gpt import GPT
from serving.engine import CacheStats
from serving.generation import RunningSequence, Vocabulary
from serving.paged.blocks import BlockPool
from serving.paged.layers import cache_shape
from serving.paged.lookup import DraftSettings
from serving.paged.results import Found, Pending, choose_next
from serving.paged.runner import Launched, Runner
from serving.paged.schedule import Row, Scheduler
from serving.paged.speculation import Speculation
from serving.paged.storage import Storage
from serving.requests import Delta, TokenLogprob

Deltas = list[tuple[RunningSequence, Delta]]


@dataclass(frozen=True, kw_only=True)
class PagedSettings:
    """rows: sequences at once. context: most tokens of one. blocks: of the cache. tokens: computed
    in one step. remember: share beginnings. ahead: launch a step before the last one's tokens
    have been looked at. drafts: compute guesses with the next token (default: never). window,
    padded, graphs, kernels: see :class:`serving.paged.runner.Runner`."""

    rows: int
    context: int
    blocks: int
    tokens: int = 2048
    remember: bool = True
    ahead: bool = False
    drafts: DraftSettings | None = None
    window: int | None = None
    padded: bool = False
    graphs: bool = False
    kernels: bool | None = None


class PagedBatch:
    """As :class:`serving.generation.Batch`, but a sequence's steps all come from :meth:`step`."""

    steady = True

    def __init__(
        self,
        model: GPT,
        vocabulary: Vocabulary,
        settings: PagedSettings,
        report: Callable[[str], None] = print,
        runner: Callable[..., Runner] = Runner,
    ) -> None:
        shape = cache_shape(model)
        self.pool = BlockPool(settings.blocks, shape.block, remember=settings.remember)
        self.scheduler = Scheduler(
            self.pool,
            rows=settings.rows,
            tokens=max(settings.tokens, settings.rows + 1),
            window=settings.window,
        )
        self.speculation: Speculation | None = None
        if settings.drafts is not None:
            self.speculation = Speculation(settings.drafts, self.scheduler)
        self.runner = runner(
            model,
            Storage(shape, settings.blocks),
            slots=settings.rows,
            context=settings.context,
            places=0 if settings.drafts is None else settings.drafts.entries,
            drawable=vocabulary.size,
            window=settings.window,
            padded=settings.padded,
            graphs=settings.graphs,
            kernels=settings.kernels,
            report=report,
        )
        self.runner.capture()
        self._vocabulary, self._ahead = vocabulary, settings.ahead
        # What was decoded has other last bits than what is read.
        self._share_decoded = settings.window is None
        self._pending: list[Pending] = []

    @property
    def count(self) -> int:
        """Sequences that run or wait here."""
        return self.scheduler.count

    def cache_stats(self) -> CacheStats:
        pool, guesses = self.pool, self.speculation
        return CacheStats(
            tokens=self.scheduler.cached_tokens,
            blocks_used=pool.used,
            blocks_free=pool.available,
            prefix_asked=pool.asked,
            prefix_found=pool.found,
            preemptions=self.scheduler.preemptions,
            drafted=0 if guesses is None else guesses.drafted,
            accepted=0 if guesses is None else guesses.accepted,
        )

    def add(self, sequence: RunningSequence) -> None:
        """Queue a sequence."""
        row = self.scheduler.add(sequence)
        if self.speculation is not None:
            self.speculation.join(row)

    def remove(self, unwanted: Callable[[RunningSequence], bool]) -> None:
        """Free what all ``unwanted`` sequences hold; what is on its way for them is dropped."""
        self.scheduler.drop(unwanted)

    def clear(self) -> None:
        self.remove(lambda sequence: True)
        self._pending.clear()

    def step(self) -> Deltas:
        """Launch a step, and hand out what the one before it found, or without ``ahead`` it
        itself."""
        deltas: Deltas = []
        if self.scheduler.blocked or self._promising():
            deltas += self._collect()
        launched = self._launch()
        deltas += self._collect()
        self._pending = launched
        if not self._ahead:
            deltas += self._collect()
        return deltas

    def _promising(self) -> bool:
        return self.speculation is not None and self.speculation.promising()

    def _launch(self) -> list[Pending]:
        launches: list[Pending] = []
        # Asked again: what was on its way then is known now.
        guesses = self.speculation if self._promising() else None
        step = self.scheduler.plan(None if guesses is None else guesses.draft)
        if not step:
            return []
        chunked = [chunk.row for chunk in step.chunks]
        self.runner.place([*step.decode, *chunked])
        if step.decode:
            rows = self.runner.ordered(step.decode)
            launches.append(self._choose(self.runner.decode(rows), rows))
        for chunks in self.runner.passes(step.chunks):
            read = self.runner.read(chunks)
            if read is not None:
                ended = [chunk.row for chunk in chunks if chunk.last]
                launches.append(self._choose(read, ended))
        return launches

    def _choose(self, launched: Launched, rows: Sequence[Row]) -> Pending:
        pending = choose_next(launched, rows, self.runner, self._vocabulary)
        for row in rows:
            row.asked += row.width
            row.in_flight += 1
        return pending

    def _collect(self) -> Deltas:
        deltas: Deltas = []
        pending, self._pending = self._pending, []
        for part in pending:
            for row, found in zip(part.rows, part.read(), strict=True):
                row.in_flight -= 1
                deltas += [(row.sequence, delta) for delta in self._take_all(row, found)]
        return deltas

    def _take_all(self, row: Row, found: Sequence[Found]) -> Iterator[Delta]:
        if row.draft and self.speculation is not None:
            found = self.speculation.accept(row, found)
        for one in found:
            # It ended, or was dropped, after the step was launched.
            if not row.ended:
                yield self._take(row, one)

    def _take(self, row: Row, found: Found) -> Delta:
        sequence = row.sequence
        scored: tuple[TokenLogprob, ...] = ()
        if not sequence.tokens and sequence.score_top is not None:
            scored = tuple(row.scored)
        if not sequence.tokens and not sequence.scored_well(list(scored)):
            delta = sequence.take(None)
        elif sequence.request.max_tokens == 0:
            delta = sequence.end_scored(finite=found.token is not None)
        else:
            delta = sequence.take(found.token, found.logprobs)
            row.ids += delta.tokens
        if sequence.error is not None or sequence.finish is not None:
            self.scheduler.end(row, broken=sequence.error is not None)
        elif self._share_decoded:
            row.table.publish(row.ids, min(row.cached, len(row.ids)))
        return replace(delta, prompt_logprobs=scored) if scored else delta
