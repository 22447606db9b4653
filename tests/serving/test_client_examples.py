"""The Python examples of docs/clients.md run as they stand, but for the address."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from mtk.cli.main import main
from serving.conversation import SETTINGS, Conversation
from tests.docs.shell_commands import ROOT, fenced
from tests.serving.scripted import Script, scripted

PAGE = ROOT / "docs" / "clients.md"
EXAMPLES = [text for language, text in fenced(PAGE) if language == "python"]


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted() as found:
        found.answers |= {
            "/v1/models": (200, {"data": [{"id": "m", "max_model_len": 64}]}),
            "/health": (200, {"ready": True}),
            "/tokenize": (200, {"tokens": [5, 6]}),
            "/detokenize": (200, {"prompt": "back"}),
        }
        usage = {"choices": [], "usage": {"completion_tokens": 2}}
        choices = [{"text": text, "finish_reason": None} for text in ("the", " end", "less")]
        found.stream("/v1/completions", *({"choices": [c]} for c in choices), usage)
        found.stream("/v1/chat/completions", {"choices": [{"delta": {"content": "Pieces."}}]})
        yield found


def test_examples(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) == 2
    for text in EXAMPLES:
        assert "localhost:5000" in text
        exec(compile(text.replace("localhost:5000", script.url), str(PAGE), "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("m True\nthe endless None 2\nthe end") and "back the endless" in out
    assert "less" not in out.split("\n")[2].removesuffix("back the endless")
    assert [body["prompt"] for path, body, _ in script.seen if path == "/v1/completions"] == [
        "Once upon a time",
        "Once upon a time",
        [5, 6],
    ]


def test_the_table_has_every_command(script: Script) -> None:
    from serving.client import Client

    known = {*Conversation(Client(script.url), {})._commands, *SETTINGS, "stop", "quit"}
    text = PAGE.read_text(encoding="utf-8")
    told = set(re.findall(r"`/(\w+)", text)) | set(re.findall(r"`(top_\w|seed|tokens)`", text))
    assert known - told == {"help"} and told <= known | {"v1"}


def test_every_option_of_the_engine_is_named() -> None:
    from dataclasses import fields

    from mtk.config.serve_engines import TensorRTConfig

    text = PAGE.read_text(encoding="utf-8")
    for field in fields(TensorRTConfig):
        assert f"--{field.name.replace('_', '-')}" in text


def test_help_of_the_client(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "--help"]) == 0
    assert "MTK_API_KEY" in " ".join(capsys.readouterr().out.split())
