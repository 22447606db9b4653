"""``docs/serving.md`` is true: its requests work, its tables are complete."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from mtk.config.serve import LimitsConfig
from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.openapi import REFUSALS, description
from serving.torch_engine import TorchEngine
from tests.docs.shell_commands import ROOT, fenced
from tests.serving.conftest import settings
from tests.serving.models import ByteTokenizer
from tests.serving.wire import call

PAGE = ROOT / "docs" / "serving.md"
TEXT = PAGE.read_text(encoding="utf-8")
CURLS = [
    line.removeprefix("$ ")
    for language, block in fenced(PAGE)
    if language == "console"
    for line in block.splitlines()
    if line.startswith("$ curl")
]
PYTHON = [block for language, block in fenced(PAGE) if language == "python"]


@pytest.fixture
def app(make_engine: Callable[..., TorchEngine]) -> Flask:
    chat = open_chat("plain", ByteTokenizer(), "tiny")
    return create_app(make_engine(), settings(chat=chat))


def rows(heading: str) -> list[list[str]]:
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("line", CURLS)
def test_requests_work(app: Flask, serve: Any, line: str) -> None:
    words = shlex.split(line)
    method = words[words.index("-X") + 1] if "-X" in words else "POST"
    path = next(word for word in words if word.startswith("localhost")).partition("/")[2]
    url = serve(app)
    body = json.loads(words[words.index("-d") + 1])
    status, answer, _ = call(url, method, f"/{path}", body)
    assert status == 200, answer


def test_there_are_requests() -> None:
    assert len(CURLS) >= 5 and len(PYTHON) == 1


def test_python_works(app: Flask, serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    url = serve(app)
    names: dict[str, Any] = {}
    exec(PYTHON[0].replace("http://localhost:5000", url), names)
    names["client"].close()
    assert capsys.readouterr().out.strip("\n") == names["answer"].choices[0].message.content.strip(
        "\n"
    )


def test_every_route_is_in_the_table(app: Flask) -> None:
    told = {
        (path, verb.strip().lower())
        for paths, verbs, _ in rows("Routes")
        for path in re.findall(r"`([^`]+)`", paths)
        for verb in verbs.split(",")
    }
    paths = description(app.extensions["mtk"])["paths"]
    assert told == {(path, verb) for path, verbs in paths.items() for verb in verbs}


def test_every_limit_is_in_the_table() -> None:
    told = {row[0].strip("`"): row[1] for row in rows("Limits")}
    limits = {f"--{name.replace('_', '-')}": value for name, value in vars(LimitsConfig()).items()}
    assert set(told) == set(limits)
    for name, value in limits.items():
        assert value is None or told[name] == str(value), name


def test_every_refusal_is_in_the_table() -> None:
    told = {code for row in rows("Errors") for code in row[0].split(", ")}
    assert set(REFUSALS) | {"401", "404", "405"} == told
