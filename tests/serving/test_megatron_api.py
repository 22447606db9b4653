"""``PUT /api``: every field, good and bad; the answer's shape; what Megatron's users send."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.serving.models import greedy_without_cache, tiny_model

BASE = {"prompts": ["Hello world"], "tokens_to_generate": 2}


def put(client: FlaskClient, **changes: Any) -> Any:
    body = {k: v for k, v in {**BASE, **changes}.items() if v is not ...}
    return client.put("/api", json=body)


BAD = [
    ("prompts", {"prompts": ...}),
    ("prompts", {"prompts": None}),
    ("prompts", {"prompts": "text"}),
    ("prompts", {"prompts": []}),
    ("prompts", {"prompts": ["a"] * 129}),
    ("prompts", {"prompts": [1]}),
    ("prompts", {"prompts": [None]}),
    ("prompts", {"prompts": ["\ud800"]}),
    ("max_len", {"max_len": 5}),
    ("sentences", {"sentences": ["a"]}),
    ("tokens_to_generate", {"tokens_to_generate": -1}),
    ("tokens_to_generate", {"tokens_to_generate": 1.0}),
    ("tokens_to_generate", {"tokens_to_generate": "1"}),
    ("tokens_to_generate", {"tokens_to_generate": True}),
    ("tokens_to_generate", {"tokens_to_generate": 10**30}),
    ("logprobs", {"logprobs": 1}),
    ("logprobs", {"tokens_to_generate": 0}),
    ("temperature", {"temperature": "1"}),
    ("temperature", {"temperature": True}),
    ("temperature", {"temperature": 0}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 100.1}),
    ("temperature", {"temperature": 10**400}),
    ("top_k", {"top_k": 1.5}),
    ("top_k", {"top_k": -1}),
    ("top_k", {"top_k": 1001}),
    ("top_p", {"top_p": "x"}),
    ("top_p", {"top_p": -0.1}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": 0.5, "top_k": 3}),
    ("top_p_decay", {"top_p_decay": 0.5}),
    ("top_p_decay", {"top_p": 0.5, "top_p_decay": 2}),
    ("top_p_decay", {"top_p": 0.5, "top_p_decay": "x"}),
    ("top_p_bound", {"top_p_bound": 0.5}),
    ("top_p_bound", {"top_p": 0.5, "top_p_bound": 0.6}),
    ("top_p_bound", {"top_p": 0.5, "top_p_bound": 0}),
    ("top_p_bound", {"top_p": 0.5, "top_p_bound": []}),
    ("add_BOS", {"add_BOS": 1}),
    ("add_BOS", {"prompts": ["a", ""]}),
    ("stop_on_double_eol", {"stop_on_double_eol": "yes"}),
    ("stop_on_eol", {"stop_on_eol": 0}),
    ("prevent_newline_after_colon", {"prevent_newline_after_colon": "x"}),
    ("random_seed", {"random_seed": -1}),
    ("random_seed", {"random_seed": 1.5}),
    ("random_seed", {"random_seed": 2**63}),
    ("no_log", {"no_log": "x"}),
    ("beam_width", {"beam_width": 0}),
    ("beam_width", {"beam_width": 1.5}),
    ("beam_width", {"beam_width": 10**6}),
    ("beam_width", {"beam_width": 2, "prompts": ["a", "b"]}),
    ("tokens_to_generate", {"beam_width": 2, "tokens_to_generate": 0, "logprobs": True}),
    ("stop_token", {"beam_width": 2, "stop_token": 50256}),
    ("stop_token", {"stop_token": "x"}),
    ("length_penalty", {"beam_width": 2, "length_penalty": "x"}),
    ("length_penalty", {"beam_width": 2, "length_penalty": 1e9}),
    ("length_penalty", {"beam_width": 2, "length_penalty": 20.5}),
    ("temprature", {"temprature": 1.0}),
    ("tokens_to_generate", {"tokens_to_generate": 90}),
]


@pytest.mark.parametrize(("param", "changes"), BAD)
def test_bad_fields(client: FlaskClient, param: str, changes: dict[str, Any]) -> None:
    response = put(client, **changes)
    assert response.status_code == 400, response.json
    error = response.json["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error" and error["message"]


GOOD: list[dict[str, Any]] = [
    {},
    {"prompts": ["a", "bb", "a long prompt of thirty letters"]},
    {"logprobs": True},
    {"logprobs": True, "tokens_to_generate": 0},
    {"temperature": 100},
    {"temperature": 0.01, "top_k": 1000},
    {"top_k": 1},
    {"top_p": 1},
    {"top_p": 0.9, "top_p_decay": 0.5, "top_p_bound": 0.1},
    {"prompts": [""], "add_BOS": True},
    {"stop_on_double_eol": True, "stop_on_eol": True},
    {"prevent_newline_after_colon": True, "prompts": ["Q:"]},
    {"random_seed": 0, "no_log": True},
    {"random_seed": 2**40},
    {"beam_width": 3, "length_penalty": 1, "stop_token": 10},
    {"beam_width": 1, "length_penalty": -0.5},
    {"temperature": None, "top_k": None},
]


@pytest.mark.parametrize("changes", GOOD)
def test_good_fields(client: FlaskClient, changes: dict[str, Any]) -> None:
    response = put(client, **changes)
    assert response.status_code == 200, response.json
    body = response.json
    prompts = changes.get("prompts", BASE["prompts"])
    expected = changes.get("beam_width", len(prompts))
    assert len(body["text"]) == len(body["segments"]) == expected
    for text, segments in zip(body["text"], body["segments"], strict=True):
        assert "".join(segments) == text
    if "beam_width" in changes:
        assert body["scores"] == sorted(body["scores"], reverse=True)
        assert "logprobs" not in body
    elif changes.get("logprobs"):
        for segments, logprobs in zip(body["segments"], body["logprobs"], strict=True):
            assert len(logprobs) == len(segments) - 1 and max(logprobs) <= 0
    else:
        assert body["logprobs"] is None


def test_text_is_prompt_and_continuation(client: FlaskClient) -> None:
    body = put(client, top_k=1, tokens_to_generate=20).json
    ids = greedy_without_cache(tiny_model(), b"Hello world", 20)
    assert body["text"][0].startswith("Hello world")
    assert "".join(body["segments"][0]) == body["text"][0]
    assert len(body["segments"][0]) == 11 + len(ids)


def test_add_bos_prepends_the_end_of_document(client: FlaskClient) -> None:
    body = put(client, prompts=["x"], add_BOS=True).json
    assert body["segments"][0][:2] == ["<|endoftext|>", "x"]


def test_the_readmes_curl(client: FlaskClient) -> None:
    sent = '{"prompts":["Hello world"],"tokens_to_generate":1}'
    response = client.put("/api", data=sent, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    assert len(response.json["segments"][0]) == 12


def test_post_is_put(client: FlaskClient) -> None:
    assert client.post("/api", json={**BASE, "top_k": 1}).json == put(client, top_k=1).json


def test_hints_are_kept(client: FlaskClient) -> None:
    message = put(client, max_len=5).json["error"]["message"]
    assert "tokens_to_generate" in message
    message = put(client, prompts=..., sentences=["a"]).json["error"]["message"]
    assert "prompts" in message and "sentences" in message
    assert "temperature" in put(client, temprature=1).json["error"]["message"]
    message = put(client, tokens_to_generate=90).json["error"]["message"]
    assert "96 tokens" in message and "101" in message and "at most 85" in message


def test_the_first_violation_in_megatrons_order_is_told(client: FlaskClient) -> None:
    response = put(client, tokens_to_generate=-1, temperature=-1, top_k=-1, nonsense=1)
    assert response.json["error"]["param"] == "tokens_to_generate"


def test_a_seed_repeats(client: FlaskClient) -> None:
    def text(seed: int, *prompts: str) -> Any:
        return put(client, prompts=list(prompts), random_seed=seed, tokens_to_generate=20).json[
            "text"
        ]

    assert text(3, "abc") == text(3, "abc") != text(4, "abc")
    assert text(3, "other", "abc", "x")[1] == text(3, "abc")[0]
