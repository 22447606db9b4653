"""The program as a user meets it: help, typos, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from mtk.cli.main import main
from mtk.cli.options import _repeat_flags


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "pretrain" in out and "130 interrupted" in out
    for told in ("or Megatron", "RACE, MNLI, QQP", "lm-evaluation-harness"):
        assert told in " ".join(out.replace("│", " ").split())


def test_help_is_fast() -> None:
    command = [sys.executable, "-m", "mtk", "--help"]
    subprocess.run(command, check=True, capture_output=True)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    # The best of five: what the program needs, not what the machine is busy with.
    assert min(times) < 0.5


def test_stage_help_never_cuts_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("--num-layers-per-virtual-pipeline-stage", "--tp", "--swiglu", "--bf16"):
        assert name in out
    assert "…" not in out and "Learning rate" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["pretrain", "--hiden-size", "4"], "--hidden-size"),
        (["pretrian"], "pretrain"),
        (["pretrain", "--recipe", "gpt-tniy"], "gpt-tiny"),
        (["pretrain", "--num-layers"], "--num-layers"),
        (["pretrain", "stray"], "stray"),
        (["pretrain", "--set", "model.num_layer=3"], "model.num_layers"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_typos_exit_2_with_the_nearest_name(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert part in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--recipe", "nope", "--json"]) == 2
    event = json.loads(capsys.readouterr().out)
    assert event["event"] == "error" and event["exit_code"] == 2 and event["kind"] == "config"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mtk ")


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        (
            ["--data-path", "0.3", "A", "0.7", "B"],
            "--data-path 0.3 --data-path A --data-path 0.7 --data-path B",
        ),
        (["--data-path", "A", "--lr", "1", "--json"], "--data-path A --lr 1 --json"),
        (["--data-path=A", "B"], "--data-path=A B"),
        (["--lr", "1", "stray"], "--lr 1 stray"),
    ],
)
def test_flags_that_take_several_values(given: list[str], expanded: str) -> None:
    assert " ".join(_repeat_flags(given, {"--data-path"})) == expanded
