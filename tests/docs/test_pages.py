"""The pages are true: commands parse and resolve, links lead somewhere, tables are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from mtk.cli import commands as registry
from mtk.cli.main import app, main
from mtk.errors import EXIT_CODES
from stages.registry import STAGES
from tests.docs.shell_commands import PAGES, ROOT, fenced, page_commands

COMMANDS = [
    pytest.param(page, command, id=f"{page.name}: mtk {' '.join(command)[:60]}")
    for page in PAGES
    for command in page_commands(page)
]
# Commands without side effects are simply run.
RUN = ("plan", "recipes", "doctor", "--help", "--version")


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_parses(
    page: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Options exist and resolve; harmless commands run."""
    monkeypatch.chdir(ROOT)
    if command[0] in RUN or command[:2] in (["flow", "list"], ["config", "show"]):
        assert main(command) == 0
    elif command[:2] == ["flow", "run"]:
        assert main([*command, "--dry-run"]) == 0
    elif stage := _stage_of(command):
        words = 2 if stage.group else 1
        shown = [word for word in command[words:] if word not in ("--json", "--force")]
        assert main(["config", "show", *command[:words], *shown]) == 0
    else:
        _parse_only(command)
    capsys.readouterr()


def _stage_of(command: list[str]) -> Any:
    names = {((stage.group or "") + " " + stage.name).strip(): stage for stage in STAGES}
    return names.get(" ".join(command[:2])) or names.get(command[0])


def _parse_only(command: list[str]) -> None:
    """Find the command and let it read its arguments without running."""
    registry.register(app)
    group: Any = typer.main.get_command(app)
    words = list(command)
    while hasattr(group, "commands"):
        assert words and words[0] in group.commands, f"mtk {' '.join(command)}: no such command"
        group = group.commands[words.pop(0)]
    group.make_context("mtk", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page: Path) -> None:
    assert all(language for language, _ in fenced(page)), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_parse(page: Path) -> None:
    import yaml

    for language, text in fenced(page):
        if language == "yaml":
            assert isinstance(yaml.safe_load(text), dict)


def test_every_stage_has_its_section() -> None:
    text = (ROOT / "docs" / "stages.md").read_text()
    for stage in STAGES:
        assert f"`mtk {((stage.group or '') + ' ' + stage.name).strip()}`" in text, stage.name


def test_exit_codes_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+?) \|", text, re.MULTILINE))
    assert rows == {str(code): meaning for code, meaning in EXIT_CODES.items()}


def test_readme_names_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "README.md").read_text()
    names = [re.split(r"[<>=!~;\[ ]", entry)[0] for entry in project["dependencies"]]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_readme_request_is_the_one_that_the_demo_sends() -> None:
    from flows.serve_check import curl_line
    from mtk.config.flow import ServeCheckConfig

    check = ServeCheckConfig()
    request = {"prompts": [check.prompt], "tokens_to_generate": check.tokens_to_generate}
    assert curl_line("127.0.0.1", 5000, request) in (ROOT / "README.md").read_text()


def test_makefile_and_ci_do_what_the_readme_says() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text and "make test" in text
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
