"""The engine in its own process: the same answers, refusals at once, and no death or hang that
anybody waits for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError, ServingError
from mtk.launch.rank_server import RankServer
from serving.engine import EngineStats, Ticket
from serving.engine_process import EngineProcess
from serving.engine_workers import start_server
from serving.errors import NotReadyError, OverloadedError
from serving.grammar import JsonGrammars
from serving.guides import Guide
from serving.metrics import Metrics
from serving.requests import BeamParams, GenerationRequest, StopRules
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from tests.serving.engine_jobs import CONTEXT, Faults, serve_tiny, start_tiny
from tests.serving.models import ByteTokenizer, greedy_without_cache, tiny_model
from tests.serving.wire import eventually

Start = Callable[..., EngineProcess]
NO_FAULTS, SLOW = Faults(), Faults(tick=0.05)


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    """One process that forks all engines of this module: starting it takes seconds."""
    running = start_server(serve_tiny.__module__)
    yield running
    running.close()


@pytest.fixture
def start(server: RankServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr("serving.engine_process.PING_EVERY", 0.25)
    made: list[EngineProcess] = []

    def one(faults: Faults = NO_FAULTS, **options: Any) -> EngineProcess:
        made.append(start_tiny(server, faults, **options))
        return made[-1]

    yield one
    for engine in made:
        engine.close(5)
    assert eventually(lambda: not any(alive(pid) for e in made for pid in e.workers.processes))


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def request(text: bytes = b"Hello", **values: Any) -> GenerationRequest:
    given = {"sampling": SamplingParams(temperature=0), "max_tokens": 10, **values}
    return GenerationRequest(prompts=(tuple(text),), **given)


def finished(ticket: Ticket) -> Ticket:
    assert ticket.wait(30)
    return ticket


def schema() -> Guide:
    pytest.importorskip("llguidance")
    grammars = JsonGrammars(ByteTokenizer(), 257)
    grammar = grammars.compile({"type": "object", "properties": {"a": {"type": "integer"}}})
    return Guide(grammar=grammar)


REQUESTS: dict[str, Callable[[], GenerationRequest]] = {
    "greedy": request,
    "sampled": lambda: request(sampling=SamplingParams(seed=3, top_k=9, top_p=0.9), samples=3),
    "prompts": lambda: GenerationRequest(
        prompts=(tuple(b"one"), tuple(b"two two")), max_tokens=5, sampling=SamplingParams(seed=1)
    ),
    "logprobs": lambda: request(
        sampling=SamplingParams(temperature=0, logprobs=3), prompt_logprobs=True
    ),
    "beams": lambda: request(beam=BeamParams(width=3, length_penalty=1.0, stop_token=256)),
    "stops": lambda: request(stop=StopRules(strings=("e",), line="eol"), max_tokens=40),
    "guide": lambda: request(guide=Guide(logit_bias=((65, 50.0),), frequency_penalty=2.0)),
    "schema": lambda: request(guide=schema(), max_tokens=30),
}


def test_answers_are_those_of_the_engine_itself(start: Start) -> None:
    """Whole and as a stream."""
    engine = start()
    here = TorchEngine(tiny_model(), ByteTokenizer(), context=CONTEXT, paged=CacheConfig())
    try:
        for make in REQUESTS.values():
            asked = make()
            found, wanted = (finished(e.submit(asked)).outputs() for e in (engine, here))
            assert found == wanted
        streamed = request(sampling=SamplingParams(seed=5, logprobs=2), stream=True, samples=2)
        ours, theirs = (
            sorted((d for d in e.submit(streamed).deltas(5.0) if d), key=lambda d: d.index)
            for e in (engine, here)
        )
        assert ours == theirs and len(ours) == 20
        assert (engine.context, engine.vocab_size) == (here.context, here.vocab_size)
    finally:
        here.close(10)


def test_many_requests_at_once_get_their_own_answers(start: Start) -> None:
    engine, model = start(max_batch_size=4), tiny_model()
    prompts = [bytes([65 + i]) * (1 + 3 * i % 17) for i in range(12)]
    tickets = [engine.submit(request(prompt, max_tokens=5 + i)) for i, prompt in enumerate(prompts)]
    for i, (prompt, ticket) in enumerate(zip(prompts, tickets, strict=True)):
        found = finished(ticket).outputs()[0].tokens
        assert list(found) == greedy_without_cache(model, prompt, 5 + i)
    assert eventually(lambda: engine.stats().running == engine.stats().cached_tokens == 0)


def test_figures_arrive(start: Start) -> None:
    engine = start()
    metrics = Metrics(engine)
    finished(engine.submit(request(samples=2)))
    wanted = (
        "mtk_generated_tokens_total 20.0",
        "mtk_prompt_tokens_total 10.0",
        'mtk_sequences_finished_total{reason="length"} 2.0',
        "mtk_queue_seconds_count 1.0",
        "mtk_time_to_first_token_seconds_count 2.0",
        "mtk_sequences_running 0.0",
        "mtk_requests_waiting 0.0",
    )
    assert eventually(lambda: all(line in metrics.exposition().decode() for line in wanted))


def test_cancelling_frees_the_row(start: Start) -> None:
    engine = start(SLOW, max_batch_size=1)
    metrics = Metrics(engine)
    first, second = engine.submit(request(max_tokens=80)), engine.submit(request(max_tokens=3))
    assert eventually(lambda: engine.stats().running == 1 and engine.stats().waiting == 1)
    first.cancel()
    assert len(finished(second).outputs()[0].tokens) == 3
    assert eventually(lambda: engine.stats().cached_tokens == 0)
    aborted = 'mtk_sequences_finished_total{reason="abort"} 1.0'
    assert eventually(lambda: aborted in metrics.exposition().decode())


def test_a_full_queue_refuses_at_once(start: Start) -> None:
    engine = start(Faults(tick=0.5), max_batch_size=1, max_queue=2)
    taken = [engine.submit(request(max_tokens=60))]
    assert eventually(lambda: engine.stats().running == 1)
    taken += [engine.submit(request()) for _ in range(2)]
    started = time.monotonic()
    for _ in range(50):
        with pytest.raises(OverloadedError, match="max_queue = 2") as caught:
            engine.submit(request())
        assert caught.value.status == 429 and caught.value.retry_after >= 1
    # The engine itself looks up only twice a second.
    assert time.monotonic() - started < 0.4
    for ticket in taken:
        ticket.cancel()
    assert eventually(lambda: engine.stats() == EngineStats(0, 0, engine.stats().cache))
    assert len(finished(engine.submit(request(max_tokens=2))).outputs()[0].tokens) == 2


def test_without_a_queue_an_idle_engine_still_takes_one(start: Start) -> None:
    engine = start(max_queue=0)
    for _ in range(2):
        assert len(finished(engine.submit(request())).outputs()[0].tokens) == 10
        assert eventually(lambda: engine.stats().running == 0)


def test_what_does_not_fit_is_refused_here(start: Start) -> None:
    engine = start()
    with pytest.raises(ServingError, match="maximum context length is 96"):
        engine.submit(request(max_tokens=1000))


def test_a_reader_that_never_reads_is_given_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engine.MAX_UNREAD", 5)
    engine = start(SLOW)
    ticket = finished(engine.submit(request(stream=True, max_tokens=90)))
    with pytest.raises(OverloadedError, match="too slowly"):
        list(ticket.deltas(1.0))
    assert eventually(lambda: engine.stats().running == 0, 2.0)


def test_signals_for_the_whole_group_are_the_servers(start: Start) -> None:
    engine = start()
    (pid,) = engine.workers.processes
    assert os.getsid(pid) != os.getsid(0)
    assert engine.probe(10).ready


KILLED = {
    "SIGKILL": (signal.SIGKILL, "its process ended", "was killed by SIGKILL"),
    "SIGSEGV": (signal.SIGSEGV, "its process ended", "was killed by SIGSEGV"),
}


@pytest.mark.parametrize("case", KILLED)
def test_a_killed_process_tells_everybody(start: Start, case: str) -> None:
    number, reason, cause = KILLED[case]
    said: list[str] = []
    engine = start(SLOW, max_batch_size=1, report=said.append)
    tickets = [engine.submit(request(max_tokens=80, stream=True)) for _ in range(3)]
    assert eventually(lambda: engine.stats().running == 1)
    os.kill(engine.workers.processes[0], number)
    killed = time.monotonic()
    for ticket in tickets:
        assert ticket.wait(3)
        with pytest.raises(NotReadyError, match=reason):
            ticket.outputs()
    assert time.monotonic() - killed < 2
    with pytest.raises(NotReadyError, match=reason):
        engine.submit(request())
    assert not engine.probe(1).ready and engine.died
    assert eventually(lambda: any(cause in line for line in said))


def test_an_error_in_a_step_is_told_with_its_traceback(start: Start) -> None:
    said: list[str] = []
    engine = start(Faults(fails=True), report=said.append)
    assert said == ["it begins"]
    ticket = finished(engine.submit(request(max_tokens=80)))
    with pytest.raises(NotReadyError, match="MemoryError"):
        ticket.outputs()
    assert engine.died and "seeded" in said[1] and "Traceback" in said[1]
    assert not engine.probe(1).ready
    # Its process does not keep the device's memory.
    assert eventually(lambda: not alive(engine.workers.processes[0]))
    assert len(said) == 2


def test_a_stopped_process_is_not_ready_and_then_dead(start: Start) -> None:
    said: list[str] = []
    engine = start(silence=1.5, report=said.append)
    ticket = engine.submit(request(max_tokens=2))
    finished(ticket)
    (pid,) = engine.workers.processes
    os.kill(pid, signal.SIGSTOP)
    stuck = engine.submit(request())
    health = engine.probe(0.3)
    assert not health.ready and "did not answer" in health.reason
    assert stuck.wait(10)
    with pytest.raises(NotReadyError, match=r"has not answered for 1\.5 s"):
        stuck.outputs()
    assert eventually(lambda: not alive(pid))
    assert engine.died and "hangs" in said[-1]


def test_a_step_without_end_is_a_death(start: Start) -> None:
    engine = start(Faults(hangs=True), step_timeout=1.5)
    ticket = engine.submit(request(max_tokens=80))
    assert ticket.wait(10)
    with pytest.raises(NotReadyError, match="step took longer than"):
        ticket.outputs()
    assert eventually(lambda: not alive(engine.workers.processes[0]))


def test_a_slow_step_is_not(start: Start) -> None:
    """Nor is an engine without work."""
    engine = start(Faults(tick=0.4), step_timeout=1.0)
    assert finished(engine.submit(request(max_tokens=4))).outputs()
    time.sleep(1.25)
    assert engine.probe(10).ready


def test_what_the_engine_cannot_open_is_raised_here(start: Start) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="seeded") as caught:
        start(Faults(refuses=True), report=said.append)
    assert caught.value.problems[0].key == "limits.max_seq_length"
    assert said == ["it begins"]


def test_closing_ends_what_runs(start: Start) -> None:
    engine = start(SLOW)
    ticket = engine.submit(request(max_tokens=80))
    assert eventually(lambda: engine.stats().running == 1)
    engine.close(5)
    with pytest.raises(NotReadyError, match="stopping"):
        finished(ticket).outputs()
    with pytest.raises(NotReadyError, match="stopping"):
        engine.submit(request())
    assert not engine.died
