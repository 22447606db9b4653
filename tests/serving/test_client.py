"""The client against mtk's own server, and against answers that it never gives."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtk.errors import ConfigError, ServingError
from serving.app import create_app
from serving.client import Client, Message, parse_address, read_key
from serving.client_stream import NoAnswerError
from serving.torch_engine import TorchEngine
from tests.serving.conftest import CONTEXT, settings
from tests.serving.models import greedy_without_cache, tiny_model
from tests.serving.scripted import Script, scripted
from tests.serving.wire import eventually


@pytest.fixture
def engine(make_engine: Callable[..., TorchEngine]) -> TorchEngine:
    return make_engine()


@pytest.fixture
def client(engine: TorchEngine, serve: Callable[..., str]) -> Client:
    keys = frozenset({"secret"})
    return Client(serve(create_app(engine, settings(api_keys=keys))), api_key="secret")


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted() as found:
        yield found


def test_complete_is_the_models_greedy_continuation(client: Client) -> None:
    ids = greedy_without_cache(tiny_model(), list(b"hello"), 6)
    assert 256 not in ids
    answer = client.complete("hello", max_tokens=6, temperature=0)
    assert answer.text == bytes(ids).decode(errors="replace")
    assert answer.usage == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert (answer.finish_reason, answer.model) == ("length", "tiny")
    assert client.complete(list(b"hello"), max_tokens=6, temperature=0).text == answer.text


def test_pieces_join_to_the_text(client: Client) -> None:
    stream = client.stream("hello", max_tokens=8, seed=3)
    pieces = list(stream)
    assert len(pieces) > 2 and "".join(pieces) == stream.answer.text


def test_options_reach_the_server(client: Client) -> None:
    first, again = (client.complete("a", max_tokens=12, seed=5).text for _ in range(2))
    assert first == again != client.complete("a", max_tokens=12, seed=6).text
    echoed = client.complete("abc", max_tokens=1, temperature=0, extra={"echo": True})
    assert echoed.text.startswith("abc")
    stopped = client.complete("hello", max_tokens=6, temperature=0, stop=echoed.text[-1:])
    assert len(stopped.text) <= 6


def test_models_tokens_health(client: Client) -> None:
    assert [(m.name, m.context) for m in client.models()] == [("tiny", CONTEXT)]
    assert client.tokenize("hé") == list("hé".encode())
    assert client.detokenize(list("hé".encode())) == "hé"
    assert client.health()["ready"] is True


def test_closing_a_stream_frees_the_row(client: Client, engine: TorchEngine) -> None:
    with client.stream("hello", max_tokens=80, seed=1, stop="\x00\x00") as stream:
        next(stream)
    assert eventually(lambda: engine.stats().running == 0)
    assert len(stream.answer.text) < 80


def test_refusals_name_status_and_field(client: Client) -> None:
    with pytest.raises(ServingError, match="maximum context") as caught:
        client.complete("hello", max_tokens=10_000)
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")
    with pytest.raises(ServingError, match="valid key") as caught:
        Client(client.url, api_key="wrong").models()
    assert caught.value.status == 401
    with pytest.raises(ConfigError, match="one answer"):
        client.stream("a", extra={"n": 2})


def test_chat(script: Script) -> None:
    deltas: list[dict[str, Any]] = [{"role": "assistant"}, {"content": "Hel"}, {"content": "lo"}]
    chunks = [{"model": "m", "choices": [{"delta": d, "finish_reason": None}]} for d in deltas]
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None}
    script.stream("/v1/chat/completions", *chunks, last, {"choices": [], "usage": {"x": 1}})
    messages = [Message(role="system", content="s"), Message(role="user", content="u")]
    answer = Client(script.url).chat(messages, max_tokens=5, seed=None)
    assert (answer.text, answer.finish_reason, answer.usage) == ("Hello", "stop", {"x": 1})
    _, body, _ = script.seen[0]
    assert body == {
        "messages": messages,
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": None}]}


def test_an_error_in_the_middle(script: Script) -> None:
    script.stream("/v1/completions", chunk("a"), {"error": {"message": "no memory", "code": 500}})
    stream = Client(script.url).stream("p")
    assert next(stream) == "a"
    with pytest.raises(NoAnswerError, match="no memory") as caught:
        next(stream)
    assert caught.value.reason == "HTTP 500" and caught.value.exit_code == 6


def test_an_end_in_the_middle(script: Script) -> None:
    script.stream("/v1/completions", chunk("a"), done=False)
    with pytest.raises(NoAnswerError, match="in the middle") as caught:
        Client(script.url).complete("p")
    assert caught.value.reason == "cut off"


def test_comments_and_unspaced_data_are_understood(script: Script) -> None:
    body = b': ping\n\ndata:{"choices":[{"text":"x"}]}\n\ndata:[DONE]\n\n'
    script.answers["/v1/completions"] = [body]
    assert Client(script.url).complete("p").text == "x"


@pytest.mark.parametrize("body", [b"<html>", b"[1]"])
def test_other_servers(script: Script, body: bytes) -> None:
    script.answers["/v1/models"] = (200, body)
    with pytest.raises(NoAnswerError, match="no server of mtk"):
        Client(script.url).models()


def test_statuses_without_a_reason(script: Script) -> None:
    for status, kind in ((404, ServingError), (503, NoAnswerError)):
        script.answers["/health"] = (status, b"gone")
        with pytest.raises(kind, match=f"answered {status}: no reason given"):
            Client(script.url).health()


def test_silence_is_a_timeout() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    held: list[socket.socket] = []
    thread = threading.Thread(target=lambda: held.append(listener.accept()[0]))
    thread.start()
    try:
        with pytest.raises(NoAnswerError, match="timed out") as caught:
            Client(str(port), timeout=0.2).models()
    finally:
        thread.join()
        for opened in (listener, *held):
            opened.close()
    assert caught.value.reason == "timed out"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("5001", ("127.0.0.1", 5001, False)),
        ("example.org", ("example.org", 5000, False)),
        ("https://example.org", ("example.org", 443, True)),
        ("http://[::1]:80/", ("::1", 80, False)),
    ],
)
def test_addresses(address: str, found: tuple[str, int, bool]) -> None:
    assert parse_address(address) == found


@pytest.mark.parametrize("address", ["ftp://x", "x:y", "http://u@x", "http://x/v1", "x?a"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(address)


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTK_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("MTK_API_KEY", "environment\n")
    (tmp_path / "key").write_text("file\nother\n")
    (tmp_path / "empty").write_text("\n")
    assert read_key(None) == "environment" and read_key(str(tmp_path / "key")) == "file"
    for name, words in (("empty", "holds no key"), ("absent", "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            read_key(str(tmp_path / name))


def test_it_needs_the_standard_library_only() -> None:
    code = (
        "import sys, serving.client\n"
        "print([m for m in ('torch', 'numpy', 'flask', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
