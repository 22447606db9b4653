"""Sequences that run together on a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mtk.models.gpt import GPT
from serving.engine import CacheStats
from serving.generation import RunningSequence, Vocabulary
from serving.paged.blocks import BlockPool
from serving.paged.layers import cache_shape
from serving.paged.results import Found, Pending, choose_next
from serving.paged.runner import Launched, Runner
from serving.paged.schedule import Row, Scheduler
from serving.paged.storage import Storage
from serving.requests import Delta, TokenLogprob

Deltas = list[tuple[RunningSequence, Delta]]


@dataclass(frozen=True, kw_only=True)
class PagedSettings:
    """rows: sequences at once. context: most tokens of one. blocks: of the cache. tokens: computed
    in one step. remember: share beginnings. ahead: launch a step before the last one's tokens
    have been looked at. padded, graphs, kernels: see :class:`serving.paged.runner.Runner`."""

    rows: int
    context: int
    blocks: int
    tokens: int = 2048
    remember: bool = True
    ahead: bool = False
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
            self.pool, rows=settings.rows, tokens=max(settings.tokens, settings.rows + 1)
        )
        self.runner = runner(
            model,
            Storage(shape, settings.blocks),
            slots=settings.rows,
            context=settings.context,
            drawable=vocabulary.size,
            padded=settings.padded,
            graphs=settings.graphs,
            kernels=settings.kernels,
            report=report,
        )
        self.runner.capture()
        self._vocabulary, self._ahead = vocabulary, settings.ahead
        self._pending: list[Pending] = []

    @property
    def count(self) -> int:
        """Sequences that run or wait here."""
        return self.scheduler.count

    def cache_stats(self) -> CacheStats:
        pool = self.pool
        return CacheStats(
            tokens=self.scheduler.cached_tokens,
            blocks_used=pool.used,
            blocks_free=pool.available,
            prefix_asked=pool.asked,
            prefix_found=pool.found,
            preemptions=self.scheduler.preemptions,
        )

    def add(self, sequence: RunningSequence) -> None:
        """Queue a sequence."""
        self.scheduler.add(sequence)

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
        if self.scheduler.blocked:
            deltas += self._collect()
        launched = self._launch()
        deltas += self._collect()
        self._pending = launched
        if not self._ahead:
            deltas += self._collect()
        return deltas

    def _launch(self) -> list[Pending]:
        step, launches = self.scheduler.plan(), []
        if not step:
            return []
        chunked = [chunk.row for chunk in step.chunks]
        self.runner.place([*step.decode, *chunked])
        if step.decode:
            launches.append(self._choose(self.runner.decode(step.decode), step.decode))
        if step.chunks:
            read = self.runner.read(step.chunks)
            if read is not None:
                ended = [chunk.row for chunk in step.chunks if chunk.last]
                launches.append(self._choose(read, ended))
        return launches

    def _choose(self, launched: Launched, rows: Sequence[Row]) -> Pending:
        pending = choose_next(launched, rows, self.runner, self._vocabulary)
        for row in rows:
            row.asked += 1
            row.in_flight += 1
        return pending

    def _collect(self) -> Deltas:
        deltas: Deltas = []
        pending, self._pending = self._pending, []
        for part in pending:
            for row, found in zip(part.rows, part.read(), strict=True):
                row.in_flight -= 1
                # It ended, or was dropped, after the step was launched.
                if not row.ended:
                    deltas.append((row.sequence, self._take(row, found)))
        return deltas

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
        else:
            row.table.publish(row.ids, min(row.cached, len(row.ids)))
        return replace(delta, prompt_logprobs=scored)
