"""The engine on plain PyTorch: one thread that owns the model and decodes all rows together.

Every tick takes in waiting sequences, decodes one token for all running ones and advances beam
searches by a step. On a paged cache (:mod:`serving.paged`) as many sequences are taken in as there
is room for, and their prompts are read in chunks beside the decoding; on dense caches, which
models with states need, one, whose prompt is read at once. Requests take turns, so a long list of
prompts does not keep others waiting; a cancelled request loses its rows at the next tick.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from mtk.config.serve import CacheConfig
from mtk.errors import ServingError
from mtk.models.gpt import GPT
from mtk.tokenizers import Tokenizer
from serving import beam
from serving.decoding import SequenceDecoder
from serving.encoder_prompt import EncoderPrompt
from serving.engine import EngineStats, Health, Observer, Ticket
from serving.engine_jobs import BeamSearch, Job, Probe
from serving.engine_parts import ALONE, Parts
from serving.errors import NotReadyError, describe
from serving.generation import Batch, RunningSequence, SequenceBatch, Vocabulary
from serving.paged.batch import PagedBatch
from serving.paged.budget import paged_settings
from serving.queue_limit import QueueLimit
from serving.requests import Delta, GenerationRequest, check_fits

# A decode step this recent (seconds) proves health without a probe of its own.
RECENT = 1.0


class TorchEngine:
    """Implements :class:`serving.engine.Engine`.

    max_batch_size: sequences decoded together. max_queue: requests that may wait.
    context: most tokens of a sequence (with an encoder: of what the decoder writes). encoder: how
    prompts are read by an encoder; None for a model without one. paged: of the paged cache; None
    is dense caches. ahead: as in :class:`serving.paged.batch.PagedSettings` (default: on a GPU).
    parts: what computes, for a model of which other ranks have parts. report: gets the traceback
    if the thread dies, of ``error``. Raises ConfigError for a cache of nothing.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        context: int,
        max_batch_size: int = 8,
        max_queue: int = 64,
        encoder: EncoderPrompt | None = None,
        paged: CacheConfig | None = None,
        ahead: bool | None = None,
        parts: Parts = ALONE,
        report: Callable[[str], None] = print,
    ) -> None:
        self._model = model.eval()
        size = model.config.vocab_size or tokenizer.vocab_size
        self._vocabulary = Vocabulary(tokenizer, size, continues=encoder is None)
        self._encoder = encoder
        self._context = context
        self._max_batch_size = max_batch_size
        self._queue = QueueLimit(max_queue, max_batch_size)
        self._report, self._parts = report, parts
        self._observer: Observer | None = None
        self._after_tick: Callable[[], None] = lambda: None
        self._ticks = 0
        self._wake = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._probes: list[Probe] = []
        self._stopping = False
        self._death: str | None = None
        self.error: BaseException | None = None
        self._batch = self._make_batch(paged, ahead)
        self._owners: dict[RunningSequence, tuple[Job, float]] = {}
        self._beam: BeamSearch | None = None
        self._admitted: Job | None = None  # begun, but not yet among the owners
        self._last_decode = 0.0
        self._thread = threading.Thread(target=self._main, name="mtk-engine", daemon=True)
        self._thread.start()

    @torch.inference_mode()
    def _make_batch(self, paged: CacheConfig | None, ahead: bool | None) -> SequenceBatch:
        if paged is None:
            return Batch(self._decoder())
        settings = paged_settings(
            self._model, paged, rows=self._max_batch_size, context=self._context, ahead=ahead
        )
        self._context = settings.context
        return PagedBatch(self._model, self._vocabulary, settings, self._report, self._parts.runner)

    def _decoder(self) -> SequenceDecoder:
        """With caches of its own."""
        return self._parts.decoder(self._model, self._encoder)

    @property
    def encoder(self) -> EncoderPrompt | None:
        return self._encoder

    @property
    def tokenizer(self) -> Tokenizer:
        return self._vocabulary.tokenizer

    @property
    def context(self) -> int:
        return self._context

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def thread_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def died(self) -> str | None:
        """Why the thread ended, unless it was stopped on request."""
        return None if self.error is None else self._death

    @property
    def ended(self) -> str | None:
        """Why the thread ended, also on request."""
        return self._death

    def observe(self, observer: Observer) -> None:
        self._observer = observer

    def follow(self, after_tick: Callable[[], None]) -> None:
        """Call ``after_tick`` in the engine's thread when a step of work is done, and when the
        thread ends."""
        self._after_tick = after_tick

    def progress(self) -> tuple[int, bool]:
        """How many steps of work have begun, and whether there is work."""
        with self._wake:
            return self._ticks, self._has_work()

    def submit(self, request: GenerationRequest) -> Ticket:
        vocab = self._vocabulary.size
        check_fits(request, context=self._context, vocab=vocab, encoder=self._encoder)
        ticket = Ticket(request, self.wake)
        with self._wake:
            self._refuse_if_stopped()
            self._queue.check(self._waiting(), idle=self._idle())
            self._take(ticket)
        return ticket

    def take(self, ticket: Ticket) -> None:
        """Queue a ticket whose request fits, however many wait. Raises ServingError (503) when the
        engine is dead or stopping."""
        with self._wake:
            self._refuse_if_stopped()
            self._take(ticket)

    def _take(self, ticket: Ticket) -> None:
        self._jobs.append(Job(ticket))
        self._wake.notify_all()

    def probe(self, timeout: float) -> Health:
        with self._wake:
            if self._death is not None:
                return Health(False, self._death)
            if time.monotonic() - self._last_decode < RECENT:
                return Health(True)
            probe = Probe()
            self._probes.append(probe)
            self._wake.notify_all()
        probe.done.wait(timeout)
        return probe.health

    def stats(self) -> EngineStats:
        with self._wake:
            beams = 1 if self._beam else 0
            cache = self._batch.cache_stats()
            return EngineStats(self._batch.count + beams, self._waiting(), cache)

    def close(self, timeout: float) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join(timeout)

    def wake(self) -> None:
        """Let the thread look at what has changed."""
        with self._wake:
            self._wake.notify_all()

    def _waiting(self) -> int:
        return sum(not job.begun for job in self._jobs)

    def _idle(self) -> bool:
        """A row is free and nobody is before a new request."""
        return not self._jobs and self._batch.count < self._max_batch_size

    def _refuse_if_stopped(self) -> None:
        if self._death is not None:
            raise NotReadyError(self._death)
        if self._stopping:
            raise NotReadyError("the server is stopping")

    # Everything below runs in the engine's thread.

    def _main(self) -> None:
        reason = "the server is stopping"
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._ticks += 1
                    self._tick()
                    self._after_tick()
        except BaseException as error:  # the thread ends here, so nobody else would see it
            self.error = error
            reason = f"the engine died: {type(error).__name__}"
            self._report(f"{reason}\n{describe(error)}")
        finally:
            self._die(reason)
            self._after_tick()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._stopping and not self._has_work():
                self._wake.wait()
            return not self._stopping

    def _has_work(self) -> bool:
        return bool(self._jobs or self._probes or self._owners or self._beam)

    def _tick(self) -> None:
        self._answer_probes()
        self._drop_abandoned()
        while self._admit() and self._batch.steady:
            pass
        for sequence, delta in self._batch.step():
            self._deliver(sequence, delta)
        self._advance_beam()

    def _admit(self) -> bool:
        """Take in the next sequence or beam search; whether there was one with room for it."""
        with self._wake:
            job = self._next_job()
            if job is None:
                return False
            if not job.begun and self._observer is not None:
                self._observer.queued(time.monotonic() - job.ticket.submitted)
            index, job.begun = job.begun, job.begun + 1
            if not job.exhausted:
                self._jobs.append(job)
            self._admitted = job
        request = job.ticket.request
        if request.beam is not None:
            self._count_prompt(len(request.prompts[0]))
            search = beam.search(self._decoder(), self._vocabulary, request)
            self._beam = BeamSearch(job, search)
            return True
        sequence = RunningSequence(request, index, self._vocabulary)
        self._count_prompt(len(sequence.prompt))
        self._owners[sequence] = (job, job.ticket.submitted)
        delta = self._batch.add(sequence)
        if delta is not None:
            self._deliver(sequence, delta)
        return True

    def _next_job(self) -> Job | None:
        """The next job in turn that there is room for; one beam search runs at a time."""
        for _ in range(len(self._jobs)):
            job = self._jobs.popleft()
            if job.ticket.request.beam is not None:
                fits = self._beam is None
            else:
                fits = self._batch.count < self._max_batch_size
            if fits:
                return job
            self._jobs.append(job)
        return None

    def _deliver(self, sequence: RunningSequence, delta: Delta) -> None:
        job, since = self._owners[sequence]
        now = self._last_decode = time.monotonic()
        self._owners[sequence] = (job, now)
        if self._observer is not None and delta.tokens:
            self._observer.token(now - since, first=len(sequence.tokens) == 1)
        # Several steps of one sequence may come together, and only the last of them ends it.
        if sequence.error is not None and not delta.tokens:
            job.ticket.fail(sequence.error)
            del self._owners[sequence]
            self._finished("error")
            return
        job.ticket.push(delta)
        if delta.finish is not None:
            job.ticket.complete(sequence.output())
            del self._owners[sequence]
            self._finished(delta.finish)
            if job.ticket.done:
                self._queue.learn(job.ticket)

    def _advance_beam(self) -> None:
        if self._beam is None:
            return
        search = self._beam
        try:
            next(search.steps)
            self._last_decode = time.monotonic()
        except ServingError as error:
            self._beam = None
            search.job.ticket.fail(error)
            self._finished("error")
        except StopIteration as end:
            ticket = search.job.ticket
            found = beam.outputs(ticket.request, self._vocabulary, end.value)
            ticket.complete(*found, last=True)
            self._beam = None
            self._finished(found[0].finish)
            self._queue.learn(ticket)

    def _drop_abandoned(self) -> None:
        """Free what cancelled or failed requests hold."""
        abandoned = {s for s, (job, _) in self._owners.items() if job.ticket.done}
        if abandoned:
            self._batch.remove(abandoned.__contains__)
            for sequence in abandoned:
                del self._owners[sequence]
                self._finished("abort")
        with self._wake:
            self._jobs = deque(job for job in self._jobs if not job.ticket.done)
        if self._beam is not None and self._beam.job.ticket.done:
            self._beam = None
            self._finished("abort")

    def _answer_probes(self) -> None:
        with self._wake:
            probes, self._probes = self._probes, []
        if probes:
            health = self._decode_once()
            for probe in probes:
                probe.answer(health)

    def _decode_once(self) -> Health:
        """A prompt of one token and one decode step, in a cache of their own."""
        decoder = self._decoder()
        decoder.cache.add_row()
        decoder.prefill(0, [self._vocabulary.tokenizer.eod])
        if not torch.isfinite(decoder.decode([self._vocabulary.tokenizer.eod])).all():
            return Health(False, "the model computes NaN or infinite logits")
        self._last_decode = time.monotonic()
        return Health(True)

    def _count_prompt(self, tokens: int) -> None:
        if self._observer is not None:
            self._observer.prompt(tokens)

    def _finished(self, reason: str) -> None:
        if self._observer is not None:
            self._observer.finished(reason)

    def _die(self, reason: str) -> None:
        with self._wake:
            self._death = reason
            tickets = {job.ticket for job in self._jobs}
            tickets |= {job.ticket for job, _ in self._owners.values()}
            tickets |= {job.ticket for job in (self._admitted,) if job is not None}
            if self._beam is not None:
                tickets.add(self._beam.job.ticket)
            self._jobs.clear()
            self._owners.clear()
            self._beam = None
            self._batch.clear()
            probes, self._probes = self._probes, []
        for ticket in tickets:
            ticket.fail(NotReadyError(reason))
        for probe in probes:
            probe.answer(Health(False, reason))
