"""The last step against servers that behave, misbehave, or never come up."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flows import serve_check
from flows.serve_check import access_headers, curl_line, put, usable_port
from flows.settings import keep_loopback_direct
from mtk.config import make
from mtk.config.flow import ServeCheckConfig
from mtk.config.serve import ServeConfig
from mtk.errors import ArtifactError, ConfigError, ServingError, WorkerError
from mtk.log import Reporter

REQUEST = {"prompts": ["Hello world"], "tokens_to_generate": 1}
JSON = {"Content-Type": "application/json"}


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives every PUT the same answer; its URL and what it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((json.loads(content), dict(self.headers)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api", seen
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(params=["curl", "urllib"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to send the request."""
    if request.param == "urllib":
        monkeypatch.setattr(serve_check.shutil, "which", lambda name: None)
    elif serve_check.shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    return str(request.param)


def test_both_clients_send_the_same_request(client: str) -> None:
    headers = {**JSON, "Authorization": "Bearer key"}
    with answering(200, b'{"text": ["x"]}') as (url, seen):
        assert put(url, REQUEST, headers) == {"text": ["x"]}
    content, sent = seen[0]
    assert content == REQUEST
    assert sent["Content-Type"] == "application/json" and sent["Authorization"] == "Bearer key"


@pytest.mark.parametrize("client", ["curl", "urllib"])
def test_a_proxy_of_the_environment_is_passed_by(
    client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    if client == "urllib":
        monkeypatch.setattr(serve_check.shutil, "which", lambda _: None)
    with answering(200, b'{"text": ["x"]}') as (url, _):
        assert put(url, REQUEST, JSON) == {"text": ["x"]}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, None),
        ({"http_proxy": "p"}, "127.0.0.1,localhost,::1"),
        ({"HTTPS_PROXY": "p", "NO_PROXY": "corp, localhost"}, "corp,localhost,127.0.0.1,::1"),
        ({"all_proxy": "p", "no_proxy": "*"}, "*"),
    ],
)
def test_prefect_reaches_its_server_without_a_proxy(
    given: dict[str, str], kept: str | None
) -> None:
    environment = dict(given)
    keep_loopback_direct(environment)
    assert environment.get("no_proxy") == kept
    assert environment.get("NO_PROXY") == kept


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [(400, b'{"error": "prompts"}', "answered with 400"), (200, b"<html>", "no JSON")],
)
def test_wrong_answers_are_errors(client: str, status: int, body: bytes, words: str) -> None:
    with answering(status, body) as (url, _), pytest.raises(ServingError, match=words):
        put(url, REQUEST, JSON)


def test_nobody_there(client: str) -> None:
    with pytest.raises(ServingError, match="failed"):
        put("http://127.0.0.1:9/api", REQUEST, JSON)


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert usable_port("127.0.0.1", taken) not in (0, taken)


def test_a_free_port_is_kept() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = other.getsockname()[1]
    assert usable_port("127.0.0.1", free) == free


def test_an_address_of_another_machine_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"serve\.listen\.host"):
        usable_port("192.0.2.1", 5000)


def test_curl_line_is_the_readmes() -> None:
    assert curl_line("127.0.0.1", 5000, REQUEST) == (
        "curl -X PUT localhost:5000/api -H 'Content-Type: application/json' "
        """-d '{"prompts":["Hello world"],"tokens_to_generate":1}'"""
    )


def test_first_key_of_the_file_opens_the_door(tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("first\nsecond\n")
    assert access_headers(str(tmp_path / "keys"))["Authorization"] == "Bearer first"
    assert "Authorization" not in access_headers(None)


def test_kept_up_command_repeats_the_options() -> None:
    config = make(ServeConfig, load="m", max_batch_size=2, model_name="mine")
    assert serve_check._other_options(config) == ["--model-name", "mine", "--max-batch-size", "2"]


@pytest.mark.parametrize(
    ("program", "error", "words"),
    [
        ("import sys; print('mtk: artifact error: torn'); sys.exit(4)", ArtifactError, "torn"),
        ("import os; os.kill(os.getpid(), 9)", WorkerError, "exit code -9"),
        ("import time; print('loading', flush=True); time.sleep(60)", WorkerError, "not ready"),
    ],
)
def test_a_server_that_does_not_come_up(
    program: str, error: type[Exception], words: str, tmp_path: Any, monkeypatch: Any
) -> None:
    from mtk.artifacts import publish_directory
    from mtk.config.flow import FlowConfig

    with publish_directory(
        tmp_path / "model", kind="hf_model", stage="convert", config=FlowConfig()
    ) as out:
        (out.folder / "config.json").write_text("{}")
    real = serve_check.server_process
    monkeypatch.setattr(
        serve_check, "server_process", lambda command: real([sys.executable, "-c", program])
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = make(ServeConfig, load=str(tmp_path / "model"), port=port)
    check = make(ServeCheckConfig, ready_timeout=3.0)
    with pytest.raises(error, match=words):
        serve_check.check_server(config, check, Reporter(quiet=True))
