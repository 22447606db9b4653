"""``POST /v1/completions`` without streaming: fields, errors, log-probabilities, usage."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.serving.models import ByteTokenizer, greedy_without_cache, tiny_model

BASE = {"prompt": "Hello", "max_tokens": 3, "temperature": 0}


def post(client: FlaskClient, **changes: Any) -> Any:
    body = {k: v for k, v in {**BASE, **changes}.items() if v is not ...}
    return client.post("/v1/completions", json=body)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ...}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": {}}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": [["a"]]}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": [True]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [257]}),
    ("prompt", {"prompt": [[1], [10**30]]}),
    ("prompt", {"prompt": ["a"] * 129}),
    ("prompt", {"prompt": "\udfff"}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 2.5}),
    ("max_tokens", {"max_tokens": 92}),
    ("max_tokens", {"max_tokens": 10**12}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.5}),
    ("top_k", {"top_k": -1}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("n", {"n": 100, "prompt": ["a", "b"]}),
    ("n", {"n": 10**18}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": [1]}),
    ("stop", {"stop": 5}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": "x" * 257}),
    ("logprobs", {"logprobs": -1}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("echo", {"echo": 1}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": "x"}),
    ("stream", {"stream": "true"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options", {"stream_options": 1, "stream": True}),
    ("include_usage", {"stream_options": {"include_usage": 1}, "stream": True}),
    ("best_of", {"best_of": 2}),
    ("best_of", {"best_of": True}),
    ("suffix", {"suffix": "x"}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": "x"}),
    ("logit_bias", {"logit_bias": [5]}),
    ("logit_bias", {"logit_bias": {"257": 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias", {"logit_bias": {"\u0661": 1}}),
    ("logit_bias", {"logit_bias": {"5": 101}}),
    ("logit_bias", {"logit_bias": {"5": None}}),
    ("logit_bias", {"logit_bias": {"5": "1"}}),
    ("logit_bias", {"logit_bias": {"9" * 5000: 1}}),
    ("logit_bias", {"logit_bias": {f"{i:04}": 1 for i in range(301)}}),
    ("response_format", {"response_format": "json"}),
    ("response_format", {"response_format": {}}),
    ("response_format", {"response_format": {"type": "grammar"}}),
    ("response_format", {"response_format": {"type": ["text"]}}),
    ("response_format", {"response_format": {"type": "json_object", "schema": {}}}),
    ("response_format", {"response_format": {"type": "json_schema"}}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"x": 1}}}),
    ("user", {"user": 5}),
    ("model", {"model": 5}),
    ("max_token", {"max_token": 3}),
]


@pytest.mark.parametrize(("param", "changes"), BAD)
def test_bad_fields(client: FlaskClient, param: str, changes: dict[str, Any]) -> None:
    response = post(client, **changes)
    assert response.status_code == 400, response.json
    assert response.json["error"]["param"] == param
    assert set(response.json["error"]) == {"message", "type", "param", "code"}


def test_another_models_name_is_404(client: FlaskClient) -> None:
    response = post(client, model="gpt-9")
    assert response.status_code == 404 and "'tiny'" in response.json["error"]["message"]
    assert post(client, model="tiny").status_code == 200


def expected(count: int) -> str:
    return ByteTokenizer().decode(greedy_without_cache(tiny_model(), b"Hello", count))


def test_the_answer(client: FlaskClient) -> None:
    body = post(client, max_tokens=10).json
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "text": expected(10),
        "logprobs": None,
        "finish_reason": "length",
    }
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], list(b"Hello"), [list(b"Hello")]])
def test_forms_of_a_prompt(client: FlaskClient, prompt: Any) -> None:
    assert post(client, prompt=prompt).json["choices"][0]["text"] == expected(3)


def test_an_empty_prompt_begins_a_document(client: FlaskClient) -> None:
    body = post(client, prompt="").json
    assert body["usage"]["prompt_tokens"] == 1


def test_several_prompts_and_samples(client: FlaskClient) -> None:
    body = post(client, prompt=["a", "b"], n=2, temperature=1, seed=1, max_tokens=8).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0]["text"] != body["choices"][1]["text"]
    alone = post(client, prompt="b", n=2, temperature=1, seed=1, max_tokens=8).json
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in body["choices"][2:]]
    assert body["usage"]["prompt_tokens"] == 2


def test_stop_strings_end_the_text(client: FlaskClient) -> None:
    whole = expected(12)
    at = next(i for i in range(1, 11) if whole[i : i + 2] not in whole[: i + 1])
    body = post(client, max_tokens=12, stop=[whole[at : at + 2]]).json
    assert body["choices"][0]["text"] == whole[:at]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_logprobs_as_lm_eval_reads_them(client: FlaskClient) -> None:
    """echo, one token, logprobs 1: prompt + 1 values, the first null, greedy by equality."""
    body = post(client, echo=True, logprobs=1, max_tokens=1).json
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert all(len(values) == 6 for values in logprobs.values())
    assert logprobs["token_logprobs"][0] is None
    assert choice["text"] == "Hello" + expected(1) == "".join(logprobs["tokens"])
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token


def test_scoring_without_generating(client: FlaskClient) -> None:
    body = post(client, echo=True, logprobs=0, max_tokens=0).json
    assert body["choices"][0]["text"] == "Hello"
    assert body["usage"]["completion_tokens"] == 0


def test_the_two_apis_agree(client: FlaskClient) -> None:
    mine = {"random_seed": 7, "top_p": 0.8, "tokens_to_generate": 15}
    megatron = client.put("/api", json={"prompts": ["Hello"], **mine}).json["text"][0]
    openai = post(client, seed=7, top_p=0.8, temperature=1, max_tokens=15, echo=True).json
    assert openai["choices"][0]["text"] == megatron
