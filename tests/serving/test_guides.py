"""Logit bias, penalties and JSON by schema: on logits, on tokens, and over HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from flask.testing import FlaskClient

from mtk.config import make
from mtk.config.tokenizer import TokenizerConfig
from mtk.errors import ServingError
from mtk.tokenizers import build_tokenizer
from serving.app import create_app
from serving.generation import generate
from serving.grammar import JsonGrammars, token_bytes
from serving.guides import Guide
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.models import EOD, ByteTokenizer, tiny_model
from tests.serving.paged.running import ask, generate_paged

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def by_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_bias_is_added_and_the_logits_stay() -> None:
    logits_V = torch.zeros(4)
    found = Guide(logit_bias=((1, 2.5), (3, -1.0), (9, 1.0))).begin().apply(logits_V)
    assert found.tolist() == [0.0, 2.5, 0.0, -1.0] and logits_V.tolist() == [0.0] * 4


def test_penalties_count_what_was_generated() -> None:
    guide = Guide(presence_penalty=0.5, frequency_penalty=0.25).begin()
    for token in (2, 2, 0):
        guide.accept(token)
    assert guide.apply(torch.ones(4)).tolist() == [0.25, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "values",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, 100.5),)},
        {"logit_bias": ((1, float("nan")),)},
    ],
)
def test_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match=next(iter(values))):
        Guide(**values)


def test_every_path_through_a_grammar_is_valid_json() -> None:
    """A random walk over allowed bytes always ends in an instance of the schema."""
    pytest.importorskip("llguidance")
    grammar = JsonGrammars(ByteTokenizer(), 257).compile(PERSON)
    source, ends = random.Random(5), set()
    for _ in range(40):
        matcher, made = grammar.begin(), bytearray()
        for _ in range(500):
            allowed = matcher.allowed().nonzero().flatten().tolist()
            token = EOD if EOD in allowed else source.choice(allowed)
            if token == EOD:
                break
            matcher.accept(token)
            made.append(token)
        else:
            raise AssertionError("no end")
        jsonschema.validate(json.loads(made), PERSON)
        ends.add(bytes(made))
    assert len(ends) == 40


def test_the_end_is_the_only_thing_after_a_complete_answer() -> None:
    pytest.importorskip("llguidance")
    matcher = JsonGrammars(ByteTokenizer(), 257).compile({"type": "boolean"}).begin()
    for byte in b"true":
        assert matcher.allowed()[byte] and not matcher.allowed()[EOD]
        matcher.accept(byte)
    assert matcher.allowed().nonzero().flatten().tolist() == [EOD]
    matcher.accept(EOD)
    assert matcher.allowed().nonzero().flatten().tolist() == [EOD]


@pytest.mark.parametrize("seed", range(6))
def test_answers_follow_the_schema(client: FlaskClient, seed: int) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    body = {"prompt": "x", "max_tokens": 90, "seed": seed, "response_format": by_schema(schema)}
    (choice,) = client.post("/v1/completions", json=body).json["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["text"]), schema)


def test_json_object_begins_an_object(client: FlaskClient) -> None:
    pytest.importorskip("llguidance")
    body = {"prompt": "x", "max_tokens": 1, "n": 8, "response_format": {"type": "json_object"}}
    choices = client.post("/v1/completions", json=body).json["choices"]
    assert {choice["text"] for choice in choices} == {"{"}


def test_samples_have_a_place_of_their_own_in_the_grammar(client: FlaskClient) -> None:
    pytest.importorskip("llguidance")
    schema = {"enum": ["one", "three", "two"]}
    body = {"prompt": ["x", "y"], "n": 8, "max_tokens": 12, "response_format": by_schema(schema)}
    choices = client.post("/v1/completions", json=body).json["choices"]
    found = {choice["text"] for choice in choices}
    assert len(found) > 1 and found <= {'"one"', '"two"', '"three"'}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"type": "string", "pattern": "("},
        {"type": "string", "format": "nonsense"},
        {"properties": 5},
        {"minItems": 5, "maxItems": 1, "type": "array"},
    ],
)
def test_schemas_that_are_refused(client: FlaskClient, schema: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    body = {"prompt": "x", "response_format": by_schema(schema)}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400 and response.json["error"]["param"] == "response_format"


def test_a_huge_schema_names_the_limit(client: FlaskClient) -> None:
    body = {"prompt": "x", "response_format": by_schema({"description": "x" * 70_000})}
    error = client.post("/v1/completions", json=body).json["error"]
    assert error["code"] == 400 and "max_schema_bytes" in error["message"]


def test_without_the_library_it_is_a_clear_400(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    body = {"prompt": "x", "response_format": {"type": "json_object"}}
    error = client.post("/v1/completions", json=body).json["error"]
    assert error["code"] == 400 and "mtk[guided]" in error["message"]


def test_bias_and_penalties_over_http(client: FlaskClient) -> None:
    base = {"prompt": "x", "max_tokens": 8, "temperature": 0}
    text = client.post("/v1/completions", json={**base, "logit_bias": {"65": 100}})
    assert text.json["choices"][0]["text"] == "A" * 8
    both = {"logit_bias": {"65": 90, "66": 90}}
    texts = [
        client.post("/v1/completions", json={**base, **both, "frequency_penalty": penalty}).json
        for penalty in (-2, 2)
    ]
    said = [answer["choices"][0]["text"] for answer in texts]
    assert all(set(text) <= {"A", "B"} for text in said)
    # Liking repetition it stays with one letter, disliking it both come about equally often.
    assert set(said[0]) != {"A", "B"} and 2 <= said[1].count("A") <= 6


def test_reported_logprobs_stay_those_of_the_model(client: FlaskClient) -> None:
    body = {"prompt": "x", "max_tokens": 1, "logprobs": 0, "temperature": 0}
    biased = client.post("/v1/completions", json={**body, "logit_bias": {"65": 100}}).json
    scored = {"prompt": "xA", "echo": True, "max_tokens": 0, "logprobs": 0}
    plain = client.post("/v1/completions", json=scored).json
    found = biased["choices"][0]["logprobs"]["token_logprobs"][0]
    assert found == pytest.approx(plain["choices"][0]["logprobs"]["token_logprobs"][1], abs=1e-5)


def test_a_broken_grammar_ends_the_answer_and_not_the_engine(
    make_engine: Callable[..., TorchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    engine = make_engine()
    client = create_app(engine, settings()).test_client()
    monkeypatch.setattr("serving.grammar.JsonMatcher.accept", lambda matcher, token: None)
    # The matcher never moves on, so the model is asked for "{" for ever.
    body = {"prompt": "x", "max_tokens": 5, "response_format": {"type": "json_object"}}
    assert client.post("/v1/completions", json=body).json["choices"][0]["text"] == "{{{{{"
    assert engine.thread_alive


def sentencepiece_tokenizer(folder: Path) -> Any:
    library = pytest.importorskip("sentencepiece")
    text = folder / "text.txt"
    text.write_text('the quick "brown" fox: {jumps} over [the] lazy dog\n' * 50)
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "m"), vocab_size=320, byte_fallback=True,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    options = {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": str(folder / "m.model")}
    return build_tokenizer(make(TokenizerConfig, **options))


def test_bytes_of_sentencepiece_tokens(tmp_path: Path) -> None:
    """Joined they are the text as the model goes on with it, byte pieces included."""
    tokenizer = sentencepiece_tokenizer(tmp_path)
    bytes_of = token_bytes(tokenizer, tokenizer.vocab_size)
    text = 'the fox: {"é": [over]}'
    assert b"".join(bytes_of[i] for i in tokenizer.encode(text)) == b" " + text.encode()
    assert bytes_of[tokenizer.eod] == b""


def test_json_from_sentencepiece_tokens(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    tokenizer = sentencepiece_tokenizer(tmp_path)
    grammar = JsonGrammars(tokenizer, tokenizer.vocab_size).compile(PERSON)
    source = random.Random(3)
    for _ in range(10):
        matcher, made = grammar.begin(), list[int]()
        for _ in range(500):
            allowed = matcher.allowed().nonzero().flatten().tolist()
            token = tokenizer.eod if tokenizer.eod in allowed else source.choice(allowed)
            if token == tokenizer.eod:
                break
            matcher.accept(token)
            made.append(token)
        jsonschema.validate(json.loads(tokenizer.decode(made)), PERSON)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_paged_batch_guides_like_the_dense_one(ahead: bool) -> None:
    """Also where steps are launched before the last one's tokens have been looked at."""
    pytest.importorskip("llguidance")
    grammar = JsonGrammars(ByteTokenizer(), 257).compile(PERSON)
    drawn = SamplingParams(seed=3)
    requests = [
        ask((65, 66), guide=Guide(logit_bias=((70, 5.0), (71, 4.0)), frequency_penalty=1.5)),
        ask((65, 66), sampling=drawn, guide=Guide(grammar=grammar), max_tokens=80, samples=2),
        ask((65, 66), sampling=drawn),
    ]
    model = tiny_model()
    dense = [out for each in requests for out in generate(model, ByteTokenizer(), each)]
    paged, _ = generate_paged(model, *requests, ahead=ahead)
    assert [out.tokens for out in paged] == [out.tokens for out in dense]
    assert len(set(dense[0].tokens)) > 1 and dense[1].text.startswith("{")
