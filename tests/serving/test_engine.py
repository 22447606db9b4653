"""The engine: many requests at once, fairness, cancelling, full queue, death, health."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtk.config.serve import CacheConfig
from mtk.errors import ServingError
from serving.engine import MAX_UNREAD, Ticket
from serving.errors import NotReadyError, OverloadedError
from serving.generation import Decoder
from serving.paged.runner import Runner
from serving.requests import BeamParams, Delta, GenerationRequest
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from tests.serving.models import greedy_without_cache, tiny_model
from tests.serving.wire import eventually

MakeEngine = Callable[..., TorchEngine]

# Every test runs on each kind of cache, the paged one also with steps launched ahead.
CACHES: dict[str, dict[str, Any]] = {
    "dense": {"paged": None},
    "paged": {"paged": CacheConfig(), "ahead": False},
    "ahead": {"paged": CacheConfig(), "ahead": True},
}


@pytest.fixture(params=CACHES, autouse=True)
def cache(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_engine(make_engine: MakeEngine, cache: str) -> MakeEngine:
    return functools.partial(make_engine, **CACHES[cache])


def request(text: bytes = b"Hello", **values: Any) -> GenerationRequest:
    given = {"sampling": SamplingParams(temperature=0), "max_tokens": 10, **values}
    return GenerationRequest(prompts=(tuple(text),), **given)


class Gate:
    """Holds the engine's decode steps back until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        for kind in (Decoder, Runner):
            monkeypatch.setattr(kind, "decode", self._held(kind.decode))

    def _held(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def decode(decoder: Any, given: Any) -> Any:
            assert self.open.wait(20)
            return real(decoder, given)

        return decode


def tokens(ticket: Ticket) -> list[int]:
    assert ticket.wait(30)
    return list(ticket.outputs()[0].tokens)


def test_many_requests_at_once_get_their_own_answers(make_engine: MakeEngine) -> None:
    engine, model = make_engine(max_batch_size=4), tiny_model()
    prompts = [bytes([65 + i]) * (1 + 3 * i % 17) for i in range(20)]
    tickets = [engine.submit(request(prompt, max_tokens=5 + i)) for i, prompt in enumerate(prompts)]
    for i, (prompt, ticket) in enumerate(zip(prompts, tickets, strict=True)):
        assert tokens(ticket) == greedy_without_cache(model, prompt, 5 + i)
    assert eventually(lambda: engine.stats().running == 0)
    assert engine.stats().cached_tokens == 0


def test_beam_search_runs_beside_others(make_engine: MakeEngine) -> None:
    engine = make_engine()
    beam = BeamParams(width=3, length_penalty=1.0, stop_token=256)
    searches = [engine.submit(request(beam=beam, max_tokens=8)) for _ in range(3)]
    greedy = engine.submit(request())
    found = []
    for search in searches:
        assert search.wait(30)
        found.append([output.tokens for output in search.outputs()])
    assert found[0] == found[1] == found[2] and len(found[0]) == 3
    assert len(tokens(greedy)) == 10


def test_a_short_request_overtakes_a_long_list(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=1)
    many = GenerationRequest(prompts=(tuple(b"ab"),) * 40, max_tokens=20)
    long, short = engine.submit(many), engine.submit(request(max_tokens=2))
    assert short.wait(30) and not long.done
    long.cancel()


def test_cancelling_frees_the_row(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = make_engine(max_batch_size=1)
    first = engine.submit(request(max_tokens=80))
    second = engine.submit(request(max_tokens=3))
    assert eventually(lambda: engine.stats().running == 1)
    first.cancel()
    gate.open.set()
    assert len(tokens(second)) == 3
    assert first.outputs() == []


def test_waiting_requests_can_be_cancelled(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine = make_engine(max_batch_size=1)
    running, waiting = engine.submit(request()), engine.submit(request())
    waiting.cancel()
    gate.open.set()
    assert len(tokens(running)) == 10
    assert eventually(lambda: engine.stats().waiting == 0)


def test_a_full_queue_refuses(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = make_engine(max_batch_size=1, max_queue=2)
    tickets = [engine.submit(request())]
    assert eventually(lambda: engine.stats().running == 1)
    tickets += [engine.submit(request()) for _ in range(2)]
    with pytest.raises(OverloadedError, match="max_queue = 2") as caught:
        engine.submit(request())
    assert caught.value.status == 429 and caught.value.retry_after >= 1
    gate.open.set()
    assert [len(tokens(ticket)) for ticket in tickets] == [10, 10, 10]
    assert len(tokens(engine.submit(request()))) == 10


def test_without_a_queue_an_idle_engine_still_takes_one(make_engine: MakeEngine) -> None:
    assert len(tokens(make_engine(max_queue=0).submit(request()))) == 10


@pytest.mark.parametrize("place", ["decode", "prefill", "sequence", "beam"])
def test_death_tells_everybody(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, place: str, cache: str
) -> None:
    """An error in any part of a tick: no waiting client hangs, the engine says it is dead."""
    gate, said = Gate(monkeypatch), []
    engine = make_engine(max_batch_size=1, report=said.append)
    running = engine.submit(request(stream=True))
    assert eventually(lambda: engine.stats().running == 1)
    beam = BeamParams(width=2, length_penalty=1.0, stop_token=0) if place == "beam" else None
    waiting = [engine.submit(request(max_tokens=4, beam=beam)) for _ in range(2)]

    def fault(*args: Any, **values: Any) -> Any:
        raise MemoryError("seeded")

    dense = cache == "dense"
    runner = "serving.paged.runner.Runner"
    target = {
        "decode": "serving.generation.Decoder.decode" if dense else f"{runner}.decode",
        "prefill": "serving.generation.Decoder.prefill" if dense else f"{runner}.read",
        "sequence": "serving.torch_engine.RunningSequence",
        "beam": "serving.beam.outputs",
    }[place]
    monkeypatch.setattr(target, fault)
    gate.open.set()
    for ticket in (running, *waiting):
        assert ticket.wait(10)
    for ticket in waiting:
        with pytest.raises(NotReadyError, match="MemoryError"):
            ticket.outputs()
    with pytest.raises(NotReadyError):
        engine.submit(request())
    assert not engine.probe(1).ready
    assert engine.died and "seeded" in said[0]


def test_probe_decodes_a_token(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    assert engine.probe(10).ready
    monkeypatch.setattr("serving.torch_engine.RECENT", 0.0)
    assert engine.probe(10).ready
    gate = Gate(monkeypatch)
    wedged = engine.probe(0.2)
    assert not wedged.ready and "did not answer" in wedged.reason
    gate.open.set()


def test_probe_sees_broken_weights(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with torch.no_grad():
        engine._model.final_norm.weight.fill_(float("nan"))
    health = engine.probe(10)
    assert not health.ready and "NaN" in health.reason
    ticket = engine.submit(request())
    assert ticket.wait(10)
    with pytest.raises(ServingError, match="NaN"):
        ticket.outputs()
    assert not engine.died


SCORING = {"max_tokens": 0, "prompt_logprobs": True}
BEAM = {"beam": BeamParams(width=2, length_penalty=1.0, stop_token=0)}


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("weights", SCORING),
        ("weights", BEAM),
        ("one position", SCORING),
        ("one position", {"prompt_logprobs": True}),
    ],
)
def test_nan_is_an_error_and_nothing_else_suffers(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    place: str,
) -> None:
    """Scores, beams and prompts too: NaN would not even be JSON."""
    engine = make_engine()
    weight = engine._model.final_norm.weight
    sound = weight.detach().clone()
    real = engine._model.logits

    def logits(states: torch.Tensor) -> torch.Tensor:
        found = real(states).clone()
        if found.ndim == 2:
            found[0] = float("nan")
        return found

    if place == "weights":
        with torch.no_grad():
            weight.fill_(float("nan"))
    else:
        monkeypatch.setattr(engine._model, "logits", logits)
    ticket = engine.submit(request(**changes))
    assert ticket.wait(10)
    with pytest.raises(ServingError, match="NaN"):
        ticket.outputs()
    monkeypatch.undo()
    with torch.no_grad():
        weight.copy_(sound)
    assert tokens(engine.submit(request())) == greedy_without_cache(tiny_model(), b"Hello", 10)
    assert not engine.died


def test_close_ends_waiting_readers(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine = make_engine(max_batch_size=1)
    tickets = [engine.submit(request(max_tokens=90)) for _ in range(2)]
    threading.Timer(0.1, gate.open.set).start()
    engine.close(10)
    for ticket in tickets:
        with pytest.raises(NotReadyError, match="stopping"):
            ticket.outputs()
    with pytest.raises(NotReadyError):
        engine.submit(request())
    assert engine.died is None


def test_a_reader_that_never_reads_is_given_up() -> None:
    ticket = Ticket(request(stream=True), lambda: None)
    for _ in range(MAX_UNREAD + 1):
        ticket.push(Delta(0, (1,), "x"))
    with pytest.raises(OverloadedError, match="too slowly"):
        list(ticket.deltas(0.01))


def test_deltas_add_up_to_the_output(make_engine: MakeEngine) -> None:
    ticket = make_engine().submit(request(stream=True, samples=2, max_tokens=20))
    texts, finishes = {0: "", 1: ""}, []
    for delta in ticket.deltas(1.0):
        assert delta is not None
        texts[delta.index] += delta.text
        finishes += [delta.finish] * (delta.finish is not None)
    assert [output.text for output in ticket.outputs()] == [texts[0], texts[1]]
    assert finishes == ["length", "length"]
