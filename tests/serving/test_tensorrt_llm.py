"""The engine around TensorRT-LLM, on a stand-in of the package: the contract of every engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.serve import ServeConfig
from mtk.errors import ArtifactError, ConfigError, ServingError
from mtk.tokenizers import load_tokenizer
from serving.app import create_app
from serving.client import Client
from serving.engine import Ticket
from serving.errors import NotReadyError, OverloadedError
from serving.open_served import open_served
from serving.requests import BeamParams, GenerationRequest, SequenceOutput, StopRules
from serving.sampling import SamplingParams
from serving.tensorrt_llm_engine import TensorRTEngine
from serving.tensorrt_llm_open import context_of, open_tensorrt
from serving.tensorrt_llm_requests import sampling_fields, token_logprob
from serving.torch_engine import TorchEngine
from stages.convert import run as convert
from tests.convert.models import convert_config, llama, quiet, save_native
from tests.serving import tensorrt_llm_stand_in as package
from tests.serving.conftest import settings
from tests.serving.wire import eventually

GREEDY = SamplingParams(temperature=0)
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    native = save_native(folder / "native", llama(seq_length=128, max_position_embeddings=128))
    return convert(convert_config(native, folder / "model"), quiet()).path


@pytest.fixture
def engines(directory: Path) -> Iterator[Callable[..., TensorRTEngine]]:
    made: list[TensorRTEngine] = []

    def make_engine(**values: Any) -> TensorRTEngine:
        config = make(ServeConfig, load=str(directory), engine="tensorrt-llm", **values)
        made.append(open_tensorrt(config, lambda line: None).engine)
        return made[-1]

    with package.installed():
        yield make_engine
    for engine in made:
        engine.close(timeout=10)
        assert not engine.thread_alive
        assert engine._llm.stopped


@pytest.fixture
def engine(engines: Callable[..., TensorRTEngine]) -> TensorRTEngine:
    return engines()


@pytest.fixture(scope="module")
def torch_engine(directory: Path) -> Iterator[TorchEngine]:
    served = open_served(str(directory), dtype=torch.float32, device="cpu")
    found = TorchEngine(served.model, served.tokenizer, context=128, report=lambda line: None)
    yield found
    found.close(timeout=10)


def request(engine: Any, text: str = PROMPT, **values: Any) -> GenerationRequest:
    given = {"sampling": GREEDY, "max_tokens": 12, **values}
    return GenerationRequest(prompts=(tuple(engine.tokenizer.encode(text)),), **given)


def answer(engine: Any, asked: GenerationRequest) -> list[SequenceOutput]:
    ticket = engine.submit(asked)
    assert ticket.wait(30)
    return ticket.outputs()


def slow(engine: TensorRTEngine, seconds: float = 0.02) -> None:
    engine._llm.tick = seconds


STOP = {
    "length": {},
    "token": {"stop": 3},
    "second token": {"stop": 5, "end": True},
    "text": {"string": 4},
    "line": {"line": "eol"},
    "scored": {"max_tokens": 0, "prompt_logprobs": True, "logprobs": 2},
    "logprobs": {"logprobs": 3},
    "chosen only": {"logprobs": 0},
    "both": {"logprobs": 1, "prompt_logprobs": True},
}


@pytest.mark.parametrize("case", STOP.values(), ids=STOP)
def test_both_engines_say_the_same(
    engine: TensorRTEngine, torch_engine: TorchEngine, case: dict[str, Any]
) -> None:
    plain = answer(torch_engine, request(torch_engine))[0]
    stop = StopRules()
    if "stop" in case:
        ids = {plain.tokens[case["stop"]], *({engine.tokenizer.eod} if "end" in case else ())}
        stop = StopRules(token_ids=frozenset(ids))
    if "string" in case:
        stop = StopRules(strings=(plain.text[case["string"] : case["string"] + 2],))
    if "line" in case:
        stop = StopRules(line=case["line"])
    values = {k: case[k] for k in ("max_tokens", "prompt_logprobs") if k in case}
    sampling = SamplingParams(temperature=0, logprobs=case.get("logprobs"))
    for stream in (False, True):
        asked = request(engine, sampling=sampling, stop=stop, stream=stream, **values)
        (mine,), (theirs,) = answer(engine, asked), answer(torch_engine, asked)
        for name in ("index", "prompt", "tokens", "text", "steps", "finish"):
            assert getattr(mine, name) == getattr(theirs, name), name
        for name in ("logprobs", "prompt_logprobs"):
            found, wanted = getattr(mine, name), getattr(theirs, name)
            assert [one.token for one in found] == [one.token for one in wanted]
            for one, other in zip(found, wanted, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [t for t, _ in one.top] == [t for t, _ in other.top]


def test_steps_stream_and_join(engine: TensorRTEngine) -> None:
    ticket = engine.submit(request(engine, stream=True))
    deltas = [delta for delta in ticket.deltas(0.1) if delta is not None]
    (output,) = ticket.outputs()
    assert len(deltas) == 12 and "".join(delta.text for delta in deltas) == output.text
    assert deltas[-1].finish == "length" and deltas[0].finish is None


def test_samples_and_prompts_have_seeds_of_their_own(engine: TensorRTEngine) -> None:
    one = tuple(engine.tokenizer.encode(PROMPT))
    # Hot enough that two draws agree by no chance.
    sampling = SamplingParams(temperature=30.0, seed=7)
    asked = GenerationRequest(prompts=(one, one), max_tokens=8, samples=3, sampling=sampling)
    first, again = answer(engine, asked), answer(engine, asked)
    assert [o.tokens for o in first] == [o.tokens for o in again]
    assert [o.index for o in first] == list(range(6))
    # As with the other engine: samples differ, prompts of one request do not.
    assert len({o.tokens for o in first[:3]}) == 3
    assert [o.tokens for o in first[:3]] == [o.tokens for o in first[3:]]
    free = GenerationRequest(
        prompts=(one,), max_tokens=8, sampling=SamplingParams(temperature=30.0)
    )
    assert answer(engine, free)[0].tokens != answer(engine, free)[0].tokens


def test_cancelling_aborts_in_the_package(engine: TensorRTEngine) -> None:
    slow(engine)
    ticket = engine.submit(request(engine, max_tokens=100, stream=True))
    next(ticket.deltas(5.0))
    assert engine.stats().running == 1 and engine.stats().waiting == 0
    ticket.cancel()
    assert eventually(lambda: engine.stats().running == 0)
    assert engine._llm.requests[0].aborted.is_set()
    # And what is cancelled at once leaves nothing behind either.
    for _ in range(20):
        engine.submit(request(engine, max_tokens=100, samples=2)).cancel()
    assert eventually(lambda: not engine._jobs)


def test_a_text_that_ends_it_aborts_in_the_package(
    engine: TensorRTEngine, torch_engine: TorchEngine
) -> None:
    slow(engine)
    text = answer(torch_engine, request(torch_engine))[0].text
    stop = StopRules(strings=(text[2:4],))
    (output,) = answer(engine, request(engine, stop=stop, max_tokens=100))
    assert output.finish == "stop" and output.text == text[: text.index(text[2:4])]
    assert eventually(lambda: engine._llm.requests[0].aborted.is_set())


def test_a_full_queue_is_refused(engines: Callable[..., TensorRTEngine]) -> None:
    engine = engines(max_batch_size=1, max_queue=1)
    slow(engine, 0.5)
    tickets: list[Ticket] = [engine.submit(request(engine))]
    with pytest.raises(OverloadedError, match="max_queue = 1") as caught:
        for _ in range(3):
            tickets.append(engine.submit(request(engine)))
    assert caught.value.status == 429 and caught.value.retry_after >= 1
    for ticket in tickets:
        ticket.cancel()


def test_closing_ends_what_runs(engine: TensorRTEngine) -> None:
    slow(engine)
    tickets = [engine.submit(request(engine, max_tokens=100)) for _ in range(3)]
    engine.close(timeout=10)
    for ticket in tickets:
        assert ticket.wait(5)
        with pytest.raises(NotReadyError, match="stopping"):
            ticket.outputs()
    with pytest.raises(NotReadyError):
        engine.submit(request(engine))
    assert not engine.probe(1.0).ready and engine.died is None


def test_health_is_a_token(engine: TensorRTEngine) -> None:
    assert engine.probe(10.0).ready
    assert len(engine._llm.requests) == 1
    assert engine.probe(10.0).ready and len(engine._llm.requests) == 1  # just now
    engine._last_token = 0.0
    engine._llm.failure = RuntimeError("CUDA error")
    health = engine.probe(10.0)
    assert not health.ready and "CUDA error" in health.reason
    engine._llm.failure = None
    slow(engine, 1.0)
    assert "did not answer" in engine.probe(0.1).reason


def test_failures_of_the_package_end_the_request_only(engine: TensorRTEngine) -> None:
    engine._llm.failure = RuntimeError("out of memory")
    with pytest.raises(ServingError, match="RuntimeError") as caught:
        answer(engine, request(engine, samples=3))
    assert caught.value.status == 500
    engine._llm.failure = None
    assert eventually(lambda: not engine._jobs)
    assert len(answer(engine, request(engine))[0].tokens) == 12


def test_refusals_of_the_package_are_the_requests_fault(engine: TensorRTEngine) -> None:
    engine._llm.kwargs["max_seq_len"] = 5
    with pytest.raises(ServingError, match="longer than max_seq_len") as caught:
        answer(engine, request(engine, samples=2))
    assert caught.value.status == 400
    assert eventually(lambda: not engine._jobs)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"beam": BeamParams(width=2, length_penalty=1.0, stop_token=0)}, "beam_width"),
        ({"newline_after_colon": False}, "prevent_newline_after_colon"),
        ({"sampling": SamplingParams(top_p=0.9, top_p_decay=0.5)}, "top_p_decay"),
        ({"max_tokens": 10_000}, "max_tokens"),
    ],
)
def test_what_it_cannot_do_is_refused(
    engine: TensorRTEngine, values: dict[str, Any], param: str
) -> None:
    with pytest.raises(ServingError) as caught:
        engine.submit(request(engine, **values))
    assert caught.value.param == param and not engine._llm.requests


def test_figures_reach_the_observer(engine: TensorRTEngine) -> None:
    seen: list[Any] = []

    class Watch:
        def queued(self, seconds: float) -> None:
            seen.append("queued")

        def prompt(self, tokens: int) -> None:
            seen.append(("prompt", tokens))

        def token(self, seconds: float, *, first: bool) -> None:
            seen.append(("first" if first else "next", seconds >= 0))

        def finished(self, reason: str) -> None:
            seen.append(reason)

    engine.observe(Watch())
    asked = request(engine, max_tokens=3)
    answer(engine, asked)
    assert eventually(lambda: seen[-1] == "length")
    tokens = [("first", True), ("next", True), ("next", True)]
    assert seen == ["queued", ("prompt", len(asked.prompts[0])), *tokens, "length"]


def test_many_threads(engine: TensorRTEngine, torch_engine: TorchEngine) -> None:
    texts = [f"{PROMPT} {i}" for i in range(12)]
    found: dict[str, str] = {}

    def ask(text: str) -> None:
        found[text] = answer(engine, request(engine, text))[0].text

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text in texts:
        assert found[text] == answer(torch_engine, request(torch_engine, text))[0].text


def test_fields_have_the_packages_names() -> None:
    sampling = SamplingParams(temperature=0.5, top_k=7, top_p=0.9, logprobs=0)
    stop = StopRules(token_ids=frozenset({3, 9}))
    asked = GenerationRequest(prompts=((1,),), max_tokens=0, sampling=sampling, stop=stop)
    fields = sampling_fields(asked, 1, seed=5, end=9)
    made = package.SamplingParams(**fields)
    assert (made.temperature, made.top_k, made.top_p, made.max_tokens) == (0.5, 7, 0.9, 1)
    assert (made.end_id, made.stop_token_ids, made.ignore_eos) == (9, [3], False)
    assert made.logprobs == 1 and made.seed != 5
    for plain in (SamplingParams(), SamplingParams(top_p=1.0), SamplingParams(top_k=3)):
        drawn = GenerationRequest(prompts=((1,),), max_tokens=1, sampling=plain)
        assert not package.SamplingParams(**sampling_fields(drawn, 0, 0, 9)).greedy
    greedy = GenerationRequest(prompts=((1,),), max_tokens=1, sampling=GREEDY)
    found = package.SamplingParams(**sampling_fields(greedy, 0, 0, 9))
    assert found.greedy and (found.end_id, found.ignore_eos) == (-1, True)


def test_log_probabilities_in_both_forms() -> None:
    assert token_logprob(-0.5, 4, 0).logprob == -0.5
    entry = {4: package.Logprob(-2.0, 2), 7: package.Logprob(-0.5, 1)}
    found = token_logprob(entry, 4, 1)
    assert found.logprob == -2.0 and found.top == ((7, -0.5),)
    for broken in ({7: package.Logprob(-0.5)}, {4: package.Logprob(float("nan"))}):
        with pytest.raises(ServingError, match="NaN"):
            token_logprob(broken, 4, 1)


def test_the_package_gets_the_servers_limits(engines: Callable[..., TensorRTEngine]) -> None:
    made = engines(
        dtype="bf16",
        max_seq_length=64,
        max_batch_size=3,
        kv_cache_dtype="fp8",
        kv_cache_fraction=0.5,
    )
    given = made._llm.kwargs
    assert made.context == given["max_seq_len"] == 64
    assert given["max_batch_size"] == 3 and given["dtype"] == "bfloat16"
    assert given["kv_cache_config"] == package.KvCacheConfig(
        dtype="fp8", free_gpu_memory_fraction=0.5
    )
    assert engines()._llm.kwargs["dtype"] == "auto"


def test_what_the_package_cannot_load_is_told(engines: Callable[..., TensorRTEngine]) -> None:
    with pytest.raises(ArtifactError, match="Only 1 GPUs"):
        engines(tensor_parallel_size=2)


def test_over_http(engine: TensorRTEngine, torch_engine: TorchEngine, serve: Any) -> None:
    client = Client(serve(create_app(engine, settings())))
    wanted = answer(torch_engine, request(torch_engine))[0].text
    assert client.complete(PROMPT, max_tokens=12, temperature=0).text == wanted
    assert client.health()["ready"]
    with pytest.raises(ServingError, match="--engine torch has it"):
        client.request("PUT", "/api", {"prompts": ["a"], "beam_width": 2})


def test_lengths() -> None:
    assert context_of(None, {"n_positions": 64}) == 64
    assert context_of(32, {"max_position_embeddings": 64}) == context_of(32, {}) == 32
    for asked, config in ((65, {"n_positions": 64}), (None, {})):
        with pytest.raises(ConfigError, match="max_seq_length"):
            context_of(asked, config)


def test_tokenizers_are_the_same(engine: TensorRTEngine, directory: Path) -> None:
    assert engine.tokenizer.encode(PROMPT) == load_tokenizer(directory).encode(PROMPT)
