"""The engine around TensorRT-LLM: its ``LLM`` schedules and decodes, text stays mtk's.

One thread runs an event loop, in which every sequence is one ``generate_async`` of the package; n
samples of a prompt are n sequences with seeds of their own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mtk.errors import ServingError
from mtk.tokenizers import Tokenizer
from serving.engine import CacheStats, EngineStats, Health, Observer, Ticket
from serving.errors import NotReadyError, describe
from serving.generation import Vocabulary
from serving.queue_limit import QueueLimit
from serving.requests import Delta, GenerationRequest, check_fits
from serving.tensorrt_llm_requests import RemoteSequence, refuse_unsupported, sampling_fields

# A token this recent (seconds) proves health without a probe of its own.
RECENT = 5.0


@dataclass(eq=False)
class _Job:
    """A ticket, its sequences as far as they run, and what the package returned for each."""

    ticket: Ticket
    seed: int
    running: dict[int, RemoteSequence] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    tasks: list[asyncio.Task[str]] = field(default_factory=list)
    begun: bool = False

    def abort(self) -> None:
        """Give up whatever has not ended; called in the loop."""
        for result in self.results:
            if not result.finished:
                result.abort()
        for task in self.tasks:
            task.cancel()


class TensorRTEngine:
    """Implements :class:`serving.engine.Engine`.

    llm: a ``tensorrt_llm.LLM`` without a tokenizer. make_sampling: ``tensorrt_llm.SamplingParams``.
    report: gets tracebacks of what is no fault of a request.
    """

    def __init__(
        self,
        llm: Any,
        make_sampling: Callable[..., Any],
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        context: int,
        max_batch_size: int = 8,
        max_queue: int = 64,
        report: Callable[[str], None] = print,
    ) -> None:
        self._llm, self._make_sampling = llm, make_sampling
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        self._context = context
        self._max_batch_size = max_batch_size
        self._queue = QueueLimit(max_queue, max_batch_size)
        self._report = report
        self._observer: Observer | None = None
        self._lock = threading.Lock()
        self._jobs: set[_Job] = set()
        self._stopping = False
        self._death: str | None = None
        self._last_token = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="mtk-tensorrt-llm", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._vocabulary.tokenizer

    @property
    def context(self) -> int:
        return self._context

    @property
    def encoder(self) -> None:
        """Only models that continue their prompts are run."""

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def thread_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def died(self) -> str | None:
        """Why the loop ended, unless it was stopped on request."""
        return self._death

    def observe(self, observer: Observer) -> None:
        self._observer = observer

    def submit(self, request: GenerationRequest) -> Ticket:
        refuse_unsupported(request)
        check_fits(request, context=self._context, vocab=self._vocabulary.size)
        seed = request.sampling.seed
        with self._lock:
            self._refuse_if_stopped()
            self._refuse_if_full()
            ticket = Ticket(request, lambda: self._in_loop(job.abort))
            job = _Job(ticket, secrets.randbits(62) if seed is None else seed)
            self._jobs.add(job)
        self._in_loop(lambda: self._begin(job))
        return ticket

    def probe(self, timeout: float) -> Health:
        with self._lock:
            if self._stopping or self._death is not None:
                return Health(False, self._death or "the server is stopping")
            if time.monotonic() - self._last_token < RECENT:
                return Health(True)
        asked = asyncio.run_coroutine_threadsafe(self._decode_once(), self._loop)
        try:
            return asked.result(timeout)
        except concurrent.futures.TimeoutError:
            asked.cancel()
            return Health(False, "TensorRT-LLM did not answer")

    def stats(self) -> EngineStats:
        with self._lock:
            running = [s for job in self._jobs if job.begun for s in list(job.running.values())]
            waiting = sum(not job.begun for job in self._jobs)
        # What its own cache holds the package does not say; these tokens it must.
        held = sum(len(s.prompt) + len(s.tokens) for s in running)
        return EngineStats(len(running), waiting, CacheStats(held))

    def close(self, timeout: float) -> None:
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._in_loop(self._end)
        self._thread.join(timeout)
        self._llm.shutdown()

    def _refuse_if_stopped(self) -> None:
        if self._stopping or self._death is not None:
            raise NotReadyError(self._death or "the server is stopping")

    def _refuse_if_full(self) -> None:
        waiting = sum(not job.begun for job in self._jobs)
        sequences = sum(job.ticket.request.sequences for job in self._jobs)
        self._queue.check(waiting, idle=sequences < self._max_batch_size)

    def _in_loop(self, work: Callable[[], None]) -> None:
        """Run it in the engine's thread; a loop that has ended has nothing left to do."""
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    # Everything below runs in the engine's thread.

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        except BaseException as error:  # the thread ends here, so nobody else would see it
            self._death = f"the engine died: {type(error).__name__}"
            self._report(f"{self._death}\n{describe(error)}")
        finally:
            for job in self._jobs:
                job.ticket.fail(NotReadyError(self._death or "the server is stopping"))
            self._loop.close()

    def _end(self) -> None:
        for job in list(self._jobs):
            job.ticket.fail(NotReadyError("the server is stopping"))
            job.abort()
        self._loop.stop()

    def _begin(self, job: _Job) -> None:
        request = job.ticket.request
        if job.ticket.done:  # cancelled before it began
            with self._lock:
                self._jobs.discard(job)
            return
        sequences = [RemoteSequence(request, i, self._vocabulary) for i in range(request.sequences)]
        job.running = {sequence.index: sequence for sequence in sequences}
        for sequence in sequences:
            task = self._loop.create_task(self._answer(job, sequence))
            # A task that is cancelled before its first step runs none of its own code.
            task.add_done_callback(partial(self._leave, job, sequence))
            job.tasks.append(task)

    async def _answer(self, job: _Job, sequence: RemoteSequence) -> str:
        """Why the sequence ended."""
        try:
            await self._generate(job, sequence)
        except ServingError as error:
            job.ticket.fail(error)
            return "error"
        except Exception as error:
            self._report(describe(error))
            text = f"TensorRT-LLM failed: {type(error).__name__}"
            job.ticket.fail(ServingError(text, status=500))
            return "error"
        return sequence.finish or "abort"

    async def _generate(self, job: _Job, sequence: RemoteSequence) -> None:
        request, since = job.ticket.request, job.ticket.submitted
        if sequence.index == 0 and self._observer is not None:
            self._observer.queued(time.monotonic() - since)
        # Scores of a prompt come with the end only.
        result = self._submit(request, sequence, job.seed, streaming=not request.prompt_logprobs)
        job.results.append(result)
        if self._observer is not None:
            self._observer.prompt(len(sequence.prompt))
        async for step in result:
            job.begun = True
            for delta in sequence.deltas(step):
                since = self._count(delta, since, first=len(sequence.tokens) == 1)
                job.ticket.push(delta)
            if sequence.finish is not None:
                if not step.finished:
                    result.abort()  # text ended it, of which the package knows nothing
                job.ticket.complete(sequence.output())
                return
            if job.ticket.done:  # a reader that is too slow, or another sequence that failed
                job.abort()
                return

    def _submit(
        self, request: GenerationRequest, sequence: RemoteSequence, seed: int, *, streaming: bool
    ) -> Any:
        fields = sampling_fields(
            request, sequence.index % request.samples, seed, self._vocabulary.tokenizer.eod
        )
        try:
            sampling = self._make_sampling(**fields)
            return self._llm.generate_async(
                list(sequence.prompt), sampling_params=sampling, streaming=streaming
            )
        except ValueError as error:  # how the package refuses what it cannot do
            raise ServingError(f"TensorRT-LLM refused the request: {error}") from error

    def _count(self, delta: Delta, since: float, *, first: bool) -> float:
        if not delta.tokens:
            return since
        now = self._last_token = time.monotonic()
        if self._observer is not None:
            self._observer.token(now - since, first=first)
        return now

    def _leave(self, job: _Job, sequence: RemoteSequence, task: asyncio.Task[str]) -> None:
        """Account for a sequence's end; the last one takes the job along."""
        reason = "abort" if task.cancelled() else task.result()
        if self._observer is not None:
            self._observer.finished(reason)
        with self._lock:
            job.running.pop(sequence.index, None)
            last = not job.running
            if last:
                self._jobs.discard(job)
        if reason == "error":
            job.abort()
        elif last:
            self._queue.learn(job.ticket)

    async def _decode_once(self) -> Health:
        prompt = (self._vocabulary.tokenizer.eod,)
        request = GenerationRequest(prompts=(prompt,), max_tokens=1)
        try:
            result = self._submit(
                request, RemoteSequence(request, 0, self._vocabulary), 0, streaming=False
            )
            async for _ in result:
                pass
        except Exception as error:
            return Health(False, f"TensorRT-LLM failed: {error}")
        self._last_token = time.monotonic()
        return Health(True)
