"""The engine on several ranks that share each matrix gives what one process gives; a rank that dies
is the engine's death."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.config.quantize import QuantizeConfig
from mtk.config.serve import ServeConfig
from mtk.errors import ConfigError
from mtk.launch.rank_server import RankServer
from serving.engine_process import EngineProcess
from serving.engine_workers import start_server
from serving.errors import NotReadyError
from serving.open_served import open_served
from serving.requests import BeamParams, GenerationRequest, SequenceOutput
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from stages.quantize import run as quantize
from stages.serve import torch_engine
from stages.serve_process import open_process
from tests.convert.models import TEXT, bloom, gemma, gpt2_config, llama, neox, quiet, save_native
from tests.models.sizes import small_config
from tests.serving.models import HYBRID
from tests.serving.test_engine_process import alive
from tests.serving.wire import eventually

LONG = {"seq_length": 96, "max_position_embeddings": 96}
ODD = {"vocab_size": 301, "make_vocab_size_divisible_by": 1}
EXPERTS = {"num_experts": 4, "ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 16}
# Kind -> its sizes and how many ranks share it. 301 ids do not divide, nor do two groups over four.
KINDS: dict[str, tuple[Callable[[], ModelConfig], int]] = {
    "llama": (lambda: llama(untie_embeddings_and_output_weights=True, **LONG), 2),
    "llama on 4": (lambda: llama(qk_layernorm=True, **ODD, **LONG), 4),
    "gpt2": (lambda: gpt2_config(**ODD, **LONG), 2),
    "neox on 4": (lambda: neox(**LONG), 4),
    "gemma, window": (lambda: gemma(window_size=7, **LONG), 2),
    "experts": (lambda: llama(**EXPERTS, **LONG), 2),
    "bloom": (lambda: bloom(**LONG), 2),
    "hybrid": (lambda: small_config(**{**HYBRID, "vocab_size": 300, **LONG}), 2),
}
Open = Callable[..., EngineProcess]


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    running = start_server("stages.serve_shared", 4)
    yield running
    running.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def saved(folder: Path, kind: str) -> Path:
    at = folder / kind.replace(" ", "-")
    return at if at.exists() else save_native(at, KINDS[kind][0]())


def configured(path: Path, ranks: int, **changes: Any) -> ServeConfig:
    given = {"load": str(path), "device": "cpu", "num_threads": 1, **changes}
    return make(ServeConfig, tensor_model_parallel_size=ranks, **given)


@pytest.fixture
def open_shared(server: RankServer, folder: Path) -> Iterator[Open]:
    opened: list[EngineProcess] = []

    def one(kind: str, *, report: Callable[[str], None] = print, **changes: Any) -> EngineProcess:
        config = configured(saved(folder, kind), KINDS[kind][1], **changes)
        engine = open_process(config, server, report).engine
        assert isinstance(engine, EngineProcess)
        opened.append(engine)
        return engine

    yield one
    for engine in opened:
        engine.close(5)
    assert eventually(lambda: not any(alive(pid) for e in opened for pid in e.workers.processes))


@pytest.fixture
def open_alone(folder: Path) -> Iterator[Callable[..., TorchEngine]]:
    opened: list[TorchEngine] = []

    def one(kind: str, **changes: Any) -> TorchEngine:
        config = configured(saved(folder, kind), 1, **changes)
        served = open_served(config.load, dtype=torch.float32, device="cpu")
        opened.append(torch_engine(config, served.model, served.tokenizer, print))
        return opened[-1]

    yield one
    for engine in opened:
        engine.close(10)


def request(first: int = 3, **values: Any) -> GenerationRequest:
    prompt = tuple((first + 7 * i) % 290 for i in range(20))
    given = {"sampling": SamplingParams(temperature=0), "max_tokens": 12, **values}
    return GenerationRequest(prompts=(prompt,), **given)


REQUESTS = (
    request(sampling=SamplingParams(temperature=0, logprobs=4), prompt_logprobs=True),
    request(5, sampling=SamplingParams(seed=3, top_k=40, top_p=0.95), samples=2),
    request(7, beam=BeamParams(width=3, length_penalty=1.0, stop_token=0), max_tokens=6),
    request(9, max_tokens=0, prompt_logprobs=True),
)


def outputs(engine: EngineProcess | TorchEngine, asked: GenerationRequest) -> list[SequenceOutput]:
    ticket = engine.submit(asked)
    assert ticket.wait(60)
    return ticket.outputs()


def same(found: SequenceOutput, wanted: SequenceOutput) -> None:
    assert (found.tokens, found.text, found.finish) == (wanted.tokens, wanted.text, wanted.finish)
    for ours, theirs in (
        (found.logprobs, wanted.logprobs),
        (found.prompt_logprobs, wanted.prompt_logprobs),
    ):
        assert [item.token for item in ours] == [item.token for item in theirs]
        assert [item.logprob for item in ours] == pytest.approx(
            [item.logprob for item in theirs], abs=1e-3
        )
        assert [[t for t, _ in item.top] for item in ours] == [
            [t for t, _ in item.top] for item in theirs
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_one_process(
    open_shared: Open, open_alone: Callable[..., TorchEngine], kind: str
) -> None:
    engine, alone = open_shared(kind), open_alone(kind)
    assert engine.probe(20).ready
    assert (engine.context, engine.vocab_size) == (alone.context, alone.vocab_size)
    for asked in REQUESTS:
        for found, wanted in zip(outputs(engine, asked), outputs(alone, asked), strict=True):
            same(found, wanted)


def test_lost_blocks_and_known_beginnings(
    open_shared: Open, open_alone: Callable[..., TorchEngine]
) -> None:
    """A cache of 112 tokens for sequences that have 80 each, read in chunks; each twice."""
    small = {"cache": {"kv_cache_tokens": 112, "max_batched_tokens": 24}}
    engine, alone = open_shared("llama", **small), open_alone("llama")
    asked = [request(first % 3, max_tokens=60, stream=first == 0) for first in range(6)]
    tickets = [engine.submit(one) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        assert ticket.wait(60)
        same(ticket.outputs()[0], outputs(alone, one)[0])
    cache = engine.stats().cache
    assert cache.preemptions > 0 and cache.prefix_found > 0
    assert eventually(lambda: engine.stats().cached_tokens == 0)


@pytest.mark.parametrize("kind", ["llama", "llama on 4"])
def test_guesses(open_shared: Open, open_alone: Callable[..., TorchEngine], kind: str) -> None:
    """Of texts of a period. Rows come and go, and some steps have guesses of some."""
    engine = open_shared(kind, limits={"max_batch_size": 3})
    alone = open_alone(kind, cache={"speculation": "off"})
    scored = SamplingParams(temperature=0, logprobs=2)
    prompts = [tuple(40 + n + i % 5 for i in range(30)) for n in range(6)]
    asked = [
        GenerationRequest(prompts=(prompt,), sampling=scored, max_tokens=45 + 2 * n)
        for n, prompt in enumerate(prompts)
    ]
    tickets = [engine.submit(one) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        assert ticket.wait(60)
        same(ticket.outputs()[0], outputs(alone, one)[0])
    cache = engine.stats().cache
    assert cache.drafted > cache.accepted > 20


def test_fixed_shapes(open_shared: Open, open_alone: Callable[..., TorchEngine]) -> None:
    """An answer's bits are the same alone and in company."""
    engine = open_shared("llama", cache={"deterministic_mode": True})
    mine = request(sampling=SamplingParams(temperature=0, logprobs=2), max_tokens=40)
    (alone,) = outputs(engine, mine)
    others = [request(first, max_tokens=20 + first) for first in range(4, 10)]
    (first, *_), last = [engine.submit(one) for one in others], engine.submit(mine)
    assert last.wait(60) and first.wait(60)
    assert last.outputs() == [alone]
    same(alone, outputs(open_alone("llama"), mine)[0])


def test_quantised_weights(
    open_shared: Open, open_alone: Callable[..., TorchEngine], folder: Path
) -> None:
    """They are expanded here, and stay packed in one process; the numbers are the same."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    given = {"load": str(saved(folder, "llama")), "valid_data": str(folder / "text.txt")}
    config = make(QuantizeConfig, save=str(folder / "int8"), format="int8_wo", **given,
                  max_perplexity_increase=1e6)  # fmt: skip
    load = str(quantize(config, quiet()).path)
    asked = request(sampling=SamplingParams(temperature=0, logprobs=2), max_tokens=20)
    (whole,) = outputs(open_alone("llama"), asked)
    (found,) = outputs(open_shared("llama", load=load), asked)
    same(found, outputs(open_alone("llama", load=load), asked)[0])
    scores = [[item.logprob for item in one.logprobs] for one in (found, whole)]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


def test_a_cancelled_request_leaves_the_others(
    open_shared: Open, open_alone: Callable[..., TorchEngine]
) -> None:
    engine = open_shared("gpt2", limits={"max_batch_size": 2})
    gone = [engine.submit(request(first, max_tokens=70)) for first in (1, 2)]
    assert eventually(lambda: engine.stats().running == 2)
    for ticket in gone:
        ticket.cancel()
    same(outputs(engine, request(4))[0], outputs(open_alone("gpt2"), request(4))[0])


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_rank_is_the_engine_s_death(open_shared: Open, busy: bool) -> None:
    said: list[str] = []
    engine = open_shared("llama", report=said.append)
    ticket = engine.submit(request(max_tokens=70, stream=True))
    next(ticket.deltas(5.0))
    if not busy:
        assert ticket.wait(30)
    os.kill(engine.workers.processes[1], signal.SIGKILL)
    assert eventually(lambda: not engine.probe(0.5).ready, 5)
    assert eventually(lambda: engine.died is not None, 5)
    with pytest.raises(NotReadyError):
        engine.submit(request())
    if busy:
        assert ticket.wait(1)
        with pytest.raises(NotReadyError):
            ticket.outputs()
    assert eventually(lambda: any("rank 1 was killed by SIGKILL" in text for text in said), 10)
    assert eventually(lambda: not any(map(alive, engine.workers.processes)))


def test_a_rank_that_hangs_is_not_ready_and_then_dead(open_shared: Open) -> None:
    said: list[str] = []
    engine = open_shared("llama", limits={"step_timeout": 2.0}, report=said.append)
    os.kill(engine.workers.processes[1], signal.SIGSTOP)
    ticket = engine.submit(request())
    assert not engine.probe(0.5).ready
    assert ticket.wait(15)
    with pytest.raises(NotReadyError):
        ticket.outputs()
    assert eventually(lambda: not any(map(alive, engine.workers.processes)), 15)
    assert eventually(lambda: any("rank 1 never entered" in text for text in said))


def test_a_t5_is_refused(server: RankServer, folder: Path) -> None:
    config = small_config(family="t5", vocab_size=300, decoder_seq_length=16)
    path = save_native(folder / "t5", config)
    with pytest.raises(ConfigError, match="is a T5") as caught:
        open_process(configured(path, 2), server, print)
    assert [problem.key for problem in caught.value.problems] == ["tensor_model_parallel_size"]


def test_what_does_not_divide_is_refused(server: RankServer, folder: Path) -> None:
    with pytest.raises(ConfigError, match="must divide model") as caught:
        open_process(configured(saved(folder, "llama"), 3), server, print)
    assert {problem.key for problem in caught.value.problems} == {"tensor_model_parallel_size"}


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_model_parallel_size": 0},
        {"tensor_model_parallel_size": 2, "engine_process": False},
        {"tensor_model_parallel_size": 2, "engine": "tensorrt-llm"},
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tensor_model_parallel_size"):
        make(ServeConfig, load="x", **changes)
