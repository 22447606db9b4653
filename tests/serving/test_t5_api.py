"""Every route on a T5: what its decoder writes, its limits, and what it cannot be asked."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from flask.testing import FlaskClient

from mtk.models.gpt import GPT
from mtk.models.t5 import T5
from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.encoder_prompt import CODE, EncoderPrompt
from serving.requests import BeamParams, GenerationRequest
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.models import T5_11, PairTokenizer, greedy_pair, tiny_model
from tests.serving.wire import eventually

EOS, START, READ, WRITTEN = 256, 257, 60, 40
TEXT = PairTokenizer()


def t5_engine(**values: Any) -> TorchEngine:
    options = {"context": WRITTEN, "encoder": EncoderPrompt(START, READ), **values}
    return TorchEngine(model(), TEXT, report=lambda line: None, **options)


def model() -> GPT:
    return tiny_model(**T5_11)


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    made = t5_engine(max_batch_size=5)
    yield made
    assert eventually(lambda: made.stats().running == 0)
    assert made.stats().cached_tokens == 0
    made.close(10)


@pytest.fixture(scope="module")
def client(engine: TorchEngine) -> FlaskClient:
    chat = open_chat("plain", TEXT, "tiny")
    return create_app(engine, settings(chat=chat)).test_client()


def expected(text: str, count: int) -> list[int]:
    """Greedy ids up to the end of the text."""
    found = greedy_pair(model(), TEXT.encode_framed(text), count)
    return found[: found.index(EOS) + 1] if EOS in found else found


def post(client: FlaskClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.json
    return answer.json


def test_megatron(client: FlaskClient) -> None:
    body = {"prompts": ["Hello", "a<b"], "tokens_to_generate": 12, "top_k": 1, "logprobs": True}
    found = post(client, "/api", **body)
    tokens = [expected(text, 12) for text in ("Hello", "a<b")]
    assert found["tokens"] == tokens
    assert found["text"] == [TEXT.decode(ids) for ids in tokens]
    assert ["".join(segments) for segments in found["segments"]] == found["text"]
    for text, ids, logprobs in zip(("Hello", "a<b"), tokens, found["logprobs"], strict=True):
        assert logprobs == pytest.approx(scores(text, ids), abs=1e-3)
    assert post(client, "/api", **(body | {"logprobs": False}))["logprobs"] is None


@torch.inference_mode()
def scores(text: str, ids: list[int]) -> list[float]:
    """Of generated tokens, by one full forward."""
    prompt = torch.tensor([TEXT.encode_framed(text)])
    logits = model()(prompt, torch.tensor([[START, *ids[:-1]]]))[0].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


def test_megatron_beams(client: FlaskClient) -> None:
    body = {"prompts": ["Hello"], "tokens_to_generate": 6, "beam_width": 3, "length_penalty": 0.5}
    found = post(client, "/api", **body)
    assert len(found["text"]) == 3 and found["scores"] == sorted(found["scores"], reverse=True)
    for text, ids, score in zip(found["text"], found["tokens"], found["scores"], strict=True):
        assert text == TEXT.decode(ids)
        if len(ids) == 6:  # others ended with EOS, which is not told
            assert score == pytest.approx(sum(scores("Hello", ids)) / 6**0.5, abs=1e-3)


def test_completions(client: FlaskClient) -> None:
    body = {"prompt": ["Hello", "x"], "max_tokens": 10, "temperature": 0, "n": 2, "logprobs": 2}
    found = post(client, "/v1/completions", **body)
    for choice in found["choices"]:
        text = ("Hello", "x")[choice["index"] // 2]
        ids = expected(text, 10)
        shown = ids[:-1] if ids[-1] == EOS else ids
        assert choice["text"] == TEXT.decode(shown)
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs == pytest.approx(scores(text, ids), abs=1e-3)
        assert choice["finish_reason"] == ("stop" if ids[-1] == EOS else "length")
    # EOS stands behind the text, as the tokenizer puts it there; ids are taken as they are.
    assert found["usage"]["prompt_tokens"] == 6 + 2
    ids = [*b"Hello", EOS]
    again = post(client, "/v1/completions", **(body | {"prompt": ids, "n": 1}))
    assert again["choices"][0]["text"] == found["choices"][0]["text"]
    assert again["usage"]["prompt_tokens"] == 6
    other = post(client, "/v1/completions", **(body | {"prompt": ids[:-1], "n": 1}))
    assert other["choices"][0]["text"] != again["choices"][0]["text"]


def test_sentinels_are_their_names(client: FlaskClient) -> None:
    body = {"prompt": "Hello", "max_tokens": 3, "temperature": 0, "logit_bias": {"258": 100}}
    found = post(client, "/v1/completions", **body)
    assert found["choices"][0]["text"] == "<extra_id_0>" * 3


def test_seeds_stops_and_streams(client: FlaskClient) -> None:
    body = {"prompt": "Hello", "max_tokens": 20, "seed": 5, "logit_bias": {"256": -100}}
    [whole] = post(client, "/v1/completions", **body)["choices"]
    assert [whole] == post(client, "/v1/completions", **body)["choices"]
    lines = client.post("/v1/completions", json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    assert "data: [DONE]" in lines
    stop = whole["text"][5:7]
    [cut] = post(client, "/v1/completions", **body, stop=stop)["choices"]
    assert cut["finish_reason"] == "stop" and cut["text"] == whole["text"].partition(stop)[0]


def test_answers_by_schema(client: FlaskClient) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"prompt": "Hello", "max_tokens": 40, "seed": 1, "response_format": wanted}
    [choice] = post(client, "/v1/completions", **body)["choices"]
    assert json.loads(choice["text"])["a"] in (1, 2)


def test_chat_has_the_decoder_to_itself(client: FlaskClient) -> None:
    """Whatever the length of the messages."""
    body = {"messages": [{"role": "user", "content": "x" * 30}], "logit_bias": {"256": -100}}
    found = post(client, "/v1/chat/completions", **body)
    assert found["usage"]["completion_tokens"] == WRITTEN


REFUSED = [
    ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
    ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0}, "echo"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("/api", {"prompts": ["a"], "tokens_to_generate": 0, "logprobs": True}, "tokens_to_generate"),
    ("/api", {"prompts": ["a"], "add_BOS": True}, "add_BOS"),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
def test_what_means_nothing(client: FlaskClient, path: str, body: Any, param: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json["error"]
    assert (error["code"], error["param"]) == (CODE, param) and "encoder" in error["message"]
    described = client.get("/openapi.json").json
    schema = described["paths"][path]["post"]["responses"]["400"]["content"]["application/json"]
    reference = described["components"]["schemas"]["Error"]
    assert "Error" in str(schema)
    jsonschema.validate(answer.json, reference)


def test_scores_of_a_prompt_never_reach_the_engine(engine: TorchEngine) -> None:
    from mtk.errors import ServingError

    with pytest.raises(ServingError, match="does not predict") as caught:
        engine.submit(GenerationRequest(prompts=((1,),), max_tokens=1, prompt_logprobs=True))
    assert caught.value.code == CODE


@pytest.mark.parametrize(
    ("length", "new", "param", "words"),
    [
        (READ, 1, "prompt", f"reads at most {READ} tokens, but the prompt has {READ + 1}"),
        (1, WRITTEN + 1, "max_tokens", f"writes at most {WRITTEN} tokens"),
    ],
)
def test_each_side_has_its_limit(
    client: FlaskClient, length: int, new: int, param: str, words: str
) -> None:
    body = {"prompt": "x" * length, "max_tokens": new}
    answer = client.post("/v1/completions", json=body)
    error = answer.json["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"]


def test_the_longest_that_there_is(client: FlaskClient) -> None:
    bias = {"256": -100}
    body = {"prompt": "x" * (READ - 1), "max_tokens": WRITTEN, "logit_bias": bias}
    found = post(client, "/v1/completions", **body)
    assert found["usage"] == {
        "prompt_tokens": READ,
        "completion_tokens": WRITTEN,
        "total_tokens": READ + WRITTEN,
    }


def test_informing_routes(client: FlaskClient) -> None:
    [found] = client.get("/v1/models").json["data"]
    assert (found["max_model_len"], found["max_encoder_len"]) == (WRITTEN, READ)
    told = post(client, "/tokenize", prompt="Hi<")
    assert told == {"tokens": [*b"Hi<", EOS], "count": 4, "max_model_len": READ}
    assert post(client, "/detokenize", tokens=[72, 258])["prompt"] == "H<extra_id_0>"
    assert client.get("/readyz").status_code == 200


def test_a_probe_decodes_and_sees_broken_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = t5_engine()
    try:
        assert engine.probe(10).ready
        monkeypatch.setattr("serving.torch_engine.RECENT", 0.0)
        with torch.no_grad():
            engine._model.encoder_norm.weight.fill_(float("nan"))
        health = engine.probe(10)
        assert not health.ready and "NaN" in health.reason
    finally:
        engine.close(10)


def test_figures_count_both_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = T5.continued

    def held(own: T5, tokens: Any, *rest: Any, **more: Any) -> Any:
        if len(tokens) > 1:
            assert gate.wait(20)
        return real(own, tokens, *rest, **more)

    monkeypatch.setattr(T5, "continued", held)
    engine = t5_engine()
    try:
        app = create_app(engine, settings())
        prompt = (*b"Hello world", EOS)
        ticket = engine.submit(
            GenerationRequest(
                prompts=(prompt,), max_tokens=9, samples=2, sampling=SamplingParams(seed=1)
            )
        )
        # Prompts are read one by one, and the first decodes alone until the second is there.
        # The prompt once, and for each sequence the start token and what it has.
        held_now = len(prompt) + 2 + 1
        assert eventually(lambda: engine.stats().cached_tokens == held_now)
        lines = app.test_client().get("/metrics").text.splitlines()
        assert f"mtk_cached_tokens {held_now}.0" in lines
        ticket.cancel()
        gate.set()
        assert eventually(lambda: engine.stats().running == 0)
        assert engine.stats().cached_tokens == 0
    finally:
        gate.set()
        engine.close(10)


def test_many_at_once_with_cancellations(engine: TorchEngine) -> None:
    """Prompts of all lengths, samples, beams, clients that leave: who stays gets its own answer,
    and nothing is held at the end."""
    chance, kept = random.Random(3), []
    beam = BeamParams(width=3, length_penalty=1.0, stop_token=EOS)
    for number in range(48):
        text = "abcdefghij"[: 1 + number % 10] * (1 + number % 5)
        count = chance.randrange(1, 16)
        request = GenerationRequest(
            prompts=(tuple(TEXT.encode_framed(text)),),
            max_tokens=count,
            sampling=SamplingParams(temperature=0),
            samples=1 + number % 3 // 2,
            beam=beam if number % 20 == 7 else None,
        )
        ticket = engine.submit(request)
        if chance.random() < 0.4:
            threading.Timer(chance.random() * 0.3, ticket.cancel).start()
        elif request.beam is None:
            kept.append((ticket, text, count))
    for ticket, text, count in kept:
        assert ticket.wait(60)
        for output in ticket.outputs():
            assert list(output.tokens) == greedy_pair(model(), TEXT.encode_framed(text), count)
    assert len(kept) > 20
    assert eventually(lambda: engine.stats().running + engine.stats().waiting == 0)
    assert engine.stats().cached_tokens == 0
