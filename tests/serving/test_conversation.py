"""``mtk client`` as a conversation: commands, several lines, memory, history, one shot."""

from __future__ import annotations

import builtins
import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtk.cli.main import main
from serving.client import Client
from serving.conversation import Conversation, printable
from serving.line_input import entries
from tests.serving.scripted import Script, scripted

OPTIONS = {"max_tokens": 8, "temperature": 1.0}


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted() as found:
        found.answers["/v1/models"] = (200, {"data": [{"id": "m"}]})
        found.answers["/tokenize"] = (200, {"tokens": [1, 2, 3]})
        found.stream("/v1/completions", {"choices": [{"text": "more"}]})
        found.stream("/v1/chat/completions", {"choices": [{"delta": {"content": "answer"}}]})
        yield found


def talk(script: Script, monkeypatch: pytest.MonkeyPatch, *lines: str, **values: Any) -> list[Any]:
    """Enter the lines; the bodies of the prompts that were sent."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        del prompt
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    Conversation(Client(script.url), dict(OPTIONS), history_file=None, **values).run()
    return [body for path, body, _ in script.seen if path.endswith("completions")]


def test_settings(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("/set temperature 0.7", "/tokens 3", r"/stop ###|\n\n", "/set top_q 1", "/seed x")
    (body,) = talk(script, monkeypatch, *lines, "/settings", "go", "/quit", "not sent")
    assert body["temperature"] == 0.7 and body["max_tokens"] == 3
    assert body["stop"] == ["###", "\n\n"] and "seed" not in body and body["prompt"] == "go"
    said = capsys.readouterr()
    assert said.out == "more\n"
    assert "did you mean /top_p?" in said.err and "/seed must be a whole number" in said.err
    assert "temperature 0.7" in said.err


def test_a_conversation_remembers(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("/system Be brief.", "one", "two", "/retry", "/reset", "three", "/chat off", "four")
    bodies = talk(script, monkeypatch, *lines)
    system = {"role": "system", "content": "Be brief."}
    user = [{"role": "user", "content": word} for word in ("one", "two", "three")]
    answer = {"role": "assistant", "content": "answer"}
    second = [system, user[0], answer, user[1]]
    assert [body.get("messages") for body in bodies] == [
        [system, user[0]],
        second,
        second,  # the answer that is asked for again is not in it
        [system, user[2]],
        None,
    ]
    assert bodies[-1]["prompt"] == "four"


def test_a_refused_prompt_is_forgotten(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = (400, {"error": {"message": "no chat template"}})
    script.answers["/v1/chat/completions"] = refused
    bodies = talk(script, monkeypatch, "one", "two", chat=True)
    assert [len(body["messages"]) for body in bodies] == [1, 1]
    assert "no chat template" in capsys.readouterr().err


def test_save_count_and_slashes(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    saved = tmp_path / "talk.txt"
    lines = ("//etc", "/retry", f"/save {saved}", f"/save {saved}", "/count some text", "/helo")
    bodies = talk(script, monkeypatch, "/retry", *lines)
    assert [body["prompt"] for body in bodies] == ["/etc", "/etc"]
    assert saved.read_text() == "> /etc\nmore\n\n> /etc\nmore\n"
    err = capsys.readouterr().err
    assert "nothing was asked" in err and "File exists" in err and "3 tokens" in err
    assert "did you mean /help?" in err


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["one", "", "two"], ["one", "", "two"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""', "a", "", 'b"""', "c"], ["a\n\nb", "c"]),
        (['"""a', "b", '"""', "c"], ["a\nb", "c"]),
        (['"""a"""'], ["a"]),
        (['"""', "a"], ["a"]),
    ],
)
def test_several_lines(typed: list[str], found: list[str]) -> None:
    lines = iter(typed)

    def read(prompt: str) -> str:
        assert prompt == ""
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    assert list(entries(read, terminal=False, complain=lambda text: None)) == found


def test_interruptions_drop_what_was_begun() -> None:
    steps: Iterator[Any] = iter(["a\\", KeyboardInterrupt(), "b", EOFError()])

    def read(prompt: str) -> str:
        del prompt
        step = next(steps)
        if isinstance(step, BaseException):
            raise step
        return str(step)

    said: list[str] = []
    assert list(entries(read, terminal=True, complain=said.append)) == ["b"]
    assert "/quit" in said[0]


def test_one_shot(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MTK_API_KEY", "secret")
    assert main(["client", script.url, "--prompt", "Hi", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "answer\n"
    path, body, headers = script.seen[-1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert main(["client", script.url, "--prompt", "Hi", "--echo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Himore"


def test_exit_codes_of_one_shot(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    for status, code in ((400, 2), (429, 2), (500, 6), (503, 6)):
        script.answers["/v1/completions"] = (status, {"error": {"message": "reason"}})
        assert main(["client", script.url, "--prompt", "a"]) == code
        assert f"the server answered {status}: reason" in capsys.readouterr().err
    assert main(["client", script.url, "--prompt", "a", "--timeout", "0"]) == 2


def test_controls_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2J\tb\n") == "a\N{REPLACEMENT CHARACTER}[2J\tb\n"


def test_history_is_kept_for_its_owner_only(script: Script, tmp_path: Path) -> None:
    """A real terminal: the second session finds the prompt above the '/quit' of the first."""
    file = tmp_path / "history"
    for keys in (b"remember me\n", 2 * b"\x1b[A" + b"\n"):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "mtk", "client", script.url, "--history", str(file)]
        child = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)
        try:
            shown = _until(ours, b"> ")
            os.write(ours, keys)
            shown += _until(ours, b"more")
            os.write(ours, b"/quit\n")
            assert child.wait(20) == 0, shown
        finally:
            child.kill()
            child.wait()
            os.close(ours)
    assert [body["prompt"] for path, body, _ in script.seen if "completions" in path] == [
        "remember me"
    ] * 2
    assert file.stat().st_mode & 0o777 == 0o600


def _until(descriptor: int, wanted: bytes, seconds: float = 30.0) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < end:
        try:
            seen += os.read(descriptor, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
    assert wanted in seen, seen
    return seen
