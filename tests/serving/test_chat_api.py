"""``POST /v1/chat/completions``: fields, templates, ends of answers, streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from mtk.errors import ConfigError, DataError
from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.torch_engine import TorchEngine
from tests.serving.conftest import CONTEXT, settings
from tests.serving.models import EOD, ByteTokenizer, greedy_without_cache, tiny_model

HELLO = [{"role": "user", "content": "Hi"}]
BASE: dict[str, Any] = {"messages": HELLO, "max_tokens": 6, "temperature": 0}
# What the template "plain" makes of HELLO.
PROMPT = "User: Hi\nAssistant:"


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    engine = TorchEngine(tiny_model(), ByteTokenizer(), context=CONTEXT, report=lambda line: None)
    app = create_app(engine, settings(chat=open_chat("plain", ByteTokenizer(), "tiny")))
    yield app.test_client()
    engine.close(timeout=10)


def post(client: FlaskClient, **changes: Any) -> Any:
    body = {k: v for k, v in {**BASE, **changes}.items() if v is not ...}
    return client.post("/v1/chat/completions", json=body)


def events(response: Any) -> list[dict[str, Any]]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


BAD: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": ...}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "Hi"}),
    ("messages", {"messages": ["Hi"]}),
    ("messages", {"messages": [{}]}),
    ("messages", {"messages": [{"role": "user"}]}),
    ("messages", {"messages": [{"role": "user", "content": None}]}),
    ("messages", {"messages": [{"role": "user", "content": 5}]}),
    ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ("messages", {"messages": [{"role": "user", "content": "\ue000"}]}),
    ("messages", {"messages": [{"role": "king", "content": "Hi"}]}),
    ("messages", {"messages": [{"role": ["user"], "content": "Hi"}]}),
    ("messages", {"messages": [{"content": "Hi"}]}),
    ("messages", {"messages": [{**HELLO[0], "mood": "good"}]}),
    ("messages", {"messages": [{**HELLO[0], "tool_calls": [{"id": 1}]}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages", {"messages": [{"role": "user", "content": ["Hi"]}]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 78}),
    ("max_tokens", {"max_tokens": 1.5}),
    ("max_completion_tokens", {"max_completion_tokens": 7}),
    ("max_completion_tokens", {"max_tokens": ..., "max_completion_tokens": -1}),
    ("logprobs", {"logprobs": 1}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("stop", {"stop": [""]}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("store", {"store": True}),
    ("modalities", {"modalities": ["audio"]}),
    ("prompt", {"prompt": "Hi"}),
    ("max_tokens", {"messages": [{"role": "user", "content": "x" * 200}], "max_tokens": ...}),
]


@pytest.mark.parametrize(("param", "changes"), BAD)
def test_bad_fields(client: FlaskClient, param: str, changes: dict[str, Any]) -> None:
    response = post(client, **changes)
    assert response.status_code == 400, response.json
    assert response.json["error"]["param"] == param


def greedy(prompt: str, count: int) -> str:
    ids = greedy_without_cache(tiny_model(), prompt.encode(), count)
    return ByteTokenizer().decode(ids)


def test_the_answer(client: FlaskClient) -> None:
    body = post(client).json
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": greedy(PROMPT, 6),
        "refusal": None,
    }
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    prompt = len(PROMPT)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 6,
        "total_tokens": prompt + 6,
    }


def test_parts_roles_and_names(client: FlaskClient) -> None:
    text = post(client).json["choices"][0]["message"]["content"]
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    for message in (
        {"role": "user", "content": parts},
        {"role": "human", "content": "Hi", "name": "Ann", "tool_calls": None},
    ):
        assert post(client, messages=[message]).json["choices"][0]["message"]["content"] == text
    by_developer = [{"role": "developer", "content": "S"}, *HELLO]
    by_system = [{"role": "system", "content": "S"}, *HELLO]
    found = [post(client, messages=m).json["choices"][0] for m in (by_developer, by_system)]
    assert found[0] == found[1]


def test_without_max_tokens_there_is_room_to_the_end(client: FlaskClient) -> None:
    body = post(client, max_tokens=..., logit_bias={str(EOD): -100}).json
    assert body["usage"]["total_tokens"] == CONTEXT
    assert (
        post(client, max_tokens=..., max_completion_tokens=3).json["usage"]["completion_tokens"]
        == 3
    )


def test_a_stream_is_the_answer_in_pieces(client: FlaskClient) -> None:
    whole = post(client, n=2, logprobs=True, top_logprobs=2).json
    chunks = events(
        post(
            client,
            n=2,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk["id"] for chunk in chunks}) == 1
    *steps, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in steps if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        said = "".join(c["delta"].get("content", "") for c in mine)
        assert said == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] and mine[-1]["delta"] == {}
        told = [token for c in mine if c["logprobs"] for token in c["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"] and len(told) == 6


def test_logprobs(client: FlaskClient) -> None:
    content = post(client, logprobs=True, top_logprobs=3).json["choices"][0]["logprobs"]["content"]
    for token in content:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]
    data = bytes(byte for token in content for byte in token["bytes"])
    assert data.decode("utf-8", "replace") == greedy(PROMPT, 6)


def test_an_answer_ends_where_the_template_ends_it() -> None:
    """As a token where the tokenizer knows it, else as text."""
    plain = open_chat("plain", ByteTokenizer(), "tiny")
    assert plain is not None and plain.stop.token_ids == {EOD} and plain.stop.strings == ()
    chatml = open_chat("chatml", ByteTokenizer(), "tiny")
    assert chatml is not None and chatml.stop.strings == ("<|im_end|>",)


def test_the_end_of_a_turn_is_not_shown() -> None:
    tokenizer = ByteTokenizer()
    engine = TorchEngine(tiny_model(), tokenizer, context=CONTEXT, report=lambda line: None)
    try:
        app = create_app(engine, settings(chat=open_chat("chatml", tokenizer, "tiny")))
        schema = {"const": "<|im_end|>"}
        forced = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        pytest.importorskip("llguidance")
        body = {"messages": HELLO, "max_tokens": 20, "response_format": forced}
        (choice,) = app.test_client().post("/v1/chat/completions", json=body).json["choices"]
        assert choice["message"]["content"] == '"' and choice["finish_reason"] == "stop"
    finally:
        engine.close(timeout=10)


def test_a_models_own_stop_and_the_clients(client: FlaskClient) -> None:
    whole = greedy(PROMPT, 6)
    (choice,) = post(client, stop=whole[3]).json["choices"]
    assert choice["message"]["content"] == whole[: whole.index(whole[3])]


def test_names_of_special_tokens_in_messages_are_text(client: FlaskClient) -> None:
    """A message cannot end the user's turn."""
    name = "<|endoftext|>"
    body = post(client, messages=[{"role": "user", "content": name}]).json
    assert body["usage"]["prompt_tokens"] == len(PROMPT) - 2 + len(name)


def test_without_a_template_it_is_a_clear_400(client: FlaskClient) -> None:
    service = client.application.extensions["mtk"]
    bare = create_app(service.engine, settings()).test_client()
    error = bare.post("/v1/chat/completions", json=BASE).json["error"]
    assert error["code"] == 400 and "--chat-template" in error["message"]
    assert bare.get("/v1/models").json["data"][0]["chat"] is False
    assert client.get("/v1/models").json["data"][0]["chat"] is True


def test_templates_of_the_option(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    assert open_chat(None, tokenizer, "tiny") is None
    with pytest.raises(ConfigError, match=r"chat_template = 'chatmll'.*chatml"):
        open_chat("chatmll", tokenizer, "tiny")
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0]['content'] }}{% if %}")
    with pytest.raises(DataError, match="does not parse"):
        open_chat(str(path), tokenizer, "tiny")
    path.write_text("{{ raise_exception('no system here') }}")
    chat = open_chat(str(path), tokenizer, "tiny")
    assert chat is not None and chat.stop.token_ids == {EOD}
