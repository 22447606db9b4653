"""The program: ``mtk serve`` and ``mtk client`` as processes, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mtk.cli.main import main
from serving.server import bind
from tests.convert.models import gpt2_config, save_native
from tests.serving.wire import Stream, call, eventually

MTK = [sys.executable, "-m", "mtk"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "demo"
    return save_native(folder, gpt2_config(max_position_embeddings=2048))


class Server:
    """``mtk serve`` in a process of its own; ended by its handle."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [*MTK, "serve", "--load", str(checkpoint), "--port", "0", "--json", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        self.event = json.loads(line)
        self.url: str = self.event["url"]

    def end(self) -> tuple[int, str, str]:
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    running = Server(checkpoint)
    yield running
    running.stop()


@pytest.fixture
def own_server(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    running = Server(checkpoint, "--ready-file", str(tmp_path / "ready"))
    yield running
    running.stop()


@pytest.mark.slow
def test_the_server_answers_and_knows_its_lineage(server: Server) -> None:
    assert server.event["event"] == "serving" and server.event["model"] == "demo"
    body = {"prompts": ["Hello world"], "tokens_to_generate": 1}
    status, answer, _ = call(server.url, "PUT", "/api", body)
    assert status == 200 and answer["text"][0].startswith("Hello world")
    _, lineage, _ = call(server.url, "GET", "/v1/lineage")
    assert lineage["kind"] == "checkpoint" and len(lineage["digest"]) == 64


@pytest.mark.slow
def test_sigterm_drains_and_exits_0(own_server: Server, tmp_path: Path) -> None:
    assert (tmp_path / "ready").read_text() == f"{own_server.url}\n"
    streams = [
        Stream(own_server.url, {"prompt": "the", "max_tokens": 150, "seed": i, "stop": None})
        for i in range(4)
    ]
    received: list[bool] = []

    def read(stream: Stream) -> None:
        for _ in stream:
            pass
        received.append(stream.finished)

    threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    code, out, err = own_server.end()
    for thread in threads:
        thread.join(10)
    assert code == 0, err
    assert received == [True] * 4
    assert json.loads(out.splitlines()[-1])["event"] == "stopped"
    assert "Traceback" not in err and not (tmp_path / "ready").exists()


@pytest.mark.slow
def test_one_shot_client(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    address = server.url.removeprefix("http://")
    shared = ["client", address, "--prompt", "the quick", "--tokens", "8", "--temperature", "0"]
    assert main(shared) == 0
    text = capsys.readouterr().out
    assert main([*shared, "--echo", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] + "\n" == "the quick" + text
    assert answer["usage"]["completion_tokens"] == 8 and answer["model"] == "demo"


@pytest.mark.slow
def test_interactive_client(server: Server) -> None:
    lines = (
        "/tokens 4\n/temperature 0\nthe quick\n\n/nonsense\n/seed x\n/settings\nthe\n/quit\nno\n"
    )
    done = subprocess.run(
        [*MTK, "client", server.url], input=lines, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 4}
    _, answer, _ = call(server.url, "POST", "/v1/completions", body)
    assert done.stdout.startswith(answer["choices"][0]["text"] + "\n")
    for words in ("/help lists all", "/seed must be a whole number", "max_tokens 4"):
        assert words in done.stderr


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_a_taken_port_is_exit_2(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    try:
        assert run("serve", "--load", checkpoint, "--port", port) == 2
    finally:
        listener.close()
    err = capsys.readouterr().err
    assert str(port) in err and "--port" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--port", "70000"], 2, "65535"),
        (["--max-batch-size", "0", "--max-queue", "-1"], 2, "2 problems"),
        (["--max-seq-length", "99999"], 2, "2048 positions"),
        (["--api-key-file", "/nowhere"], 2, "cannot be read"),
        (["--ready-file", "/nowhere/ready"], 2, "cannot be written"),
        (["--host", "nowhere.invalid"], 2, "not an address"),
        (["--dtype", "fp64"], 2, "fp32"),
        (["--prot", "1"], 2, "--prot"),
    ],
)
def test_bad_options(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    assert run("serve", "--load", checkpoint, "--port", 0, *options) == code
    assert words in capsys.readouterr().err


def test_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--load", tmp_path, "--port", 0) == 4
    bare = save_native(tmp_path / "bare", gpt2_config(), tokenizer=False)
    assert run("serve", "--load", bare, "--port", 0) == 4
    assert "no tokenizer" in capsys.readouterr().err
    assert run("serve") == 2


def test_client_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    assert run("client", f"127.0.0.1:{port}", "--prompt", "a") == 6
    err = capsys.readouterr().err
    assert "mtk serve" in err and "refused" in err
    assert run("client", "nonsense:port", "--prompt", "a") == 2
    assert run("client", f"127.0.0.1:{port}", "--json") == 2


@pytest.mark.slow
def test_client_tells_what_the_server_refused(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("client", server.url, "--prompt", "a", "--tokens", 10**6) == 2
    assert "maximum context length is 2048" in capsys.readouterr().err


def serve_until(
    checkpoint: Path, ready: Path, visit: Callable[[str], None], number: int, *options: str
) -> int:
    """``mtk serve`` in this process; ``visit`` gets the URL, then the signal is sent."""

    def visitor() -> None:
        try:
            assert eventually(ready.exists, 30)
            visit(ready.read_text().strip())
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=visitor)
    thread.start()
    code = run("serve", "--load", checkpoint, "--port", 0, "--ready-file", ready, *options)
    thread.join()
    return code


def test_an_idle_server_ends_at_once(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    def visit(url: str) -> None:
        assert call(url, "GET", "/readyz")[0] == 200
        seen.append(time.monotonic())

    assert serve_until(checkpoint, tmp_path / "ready", visit, signal.SIGINT) == 0
    assert time.monotonic() - seen[0] < 3 and not (tmp_path / "ready").exists()


def test_a_dead_engine_inside_is_exit_6(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fault(*args: Any) -> None:
        raise MemoryError("seeded")

    monkeypatch.setattr("serving.paged.runner.Runner.decode", fault)
    statuses: list[int] = []

    def visit(url: str) -> None:
        statuses.append(call(url, "PUT", "/api", {"prompts": ["the"]})[0])
        statuses.append(call(url, "GET", "/readyz")[0])

    inside = "--no-engine-process"
    assert serve_until(checkpoint, tmp_path / "ready", visit, signal.SIGTERM, inside) == 6
    assert statuses == [503, 503]
    assert "seeded" in capsys.readouterr().err


def gone(pids: Sequence[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_a_killed_engine_is_503_at_once_and_exit_6(own_server: Server) -> None:
    stream = Stream(own_server.url, {"prompt": "the", "max_tokens": 1900, "stop": None})
    chunks = iter(stream)
    next(chunks)
    (pid,) = own_server.event["engine_processes"]
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    *_, last = chunks
    assert last["error"]["code"] == 503 and not stream.finished
    assert call(own_server.url, "GET", "/readyz")[0] == 503
    assert time.monotonic() - started < 5
    assert call(own_server.url, "PUT", "/api", {"prompts": ["the"]})[0] == 503
    assert call(own_server.url, "GET", "/livez")[0] == 200
    code, _, err = own_server.end()
    assert code == 6 and "SIGKILL" in err and "Traceback" not in err


@pytest.mark.slow
def test_no_process_outlives_a_killed_server(own_server: Server) -> None:
    pids = own_server.event["engine_processes"]
    assert pids and not gone(pids)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # as whoever stops a whole group does
        os.kill(pid, signal.SIGINT)
    assert call(own_server.url, "GET", "/readyz")[0] == 200
    own_server.process.kill()
    assert eventually(lambda: gone(pids), 5)
