"""The scripts and files of examples/ are kept honest: parsed, resolved and planned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.curate_steps import CURATE_WEB
from flows.pipeline import plan_pipeline
from flows.steps import registered_stages
from mtk.cli.main import main
from tests.docs.shell_commands import ROOT, SCRIPTS, commands

SLURM = ROOT / "examples" / "pretrain_gpt3_175b.slurm"
BOOKED = ("nodes", "ntasks-per-node")
PARAMETERS = {
    "pretrain_gpt.sh": "354,",
    "pretrain_bert.sh": "336,",
    "pretrain_t5.sh": "22",
    "pretrain_gpt3_175b.slurm": "174,",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_plans(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(script.read_text())
    assert len(found) == 1
    action, *options = found[0]
    assert action in ("plan", "pretrain")
    if "175b" in script.name:
        options += ["--gpus", "1024", "--gpu", "a100"]
    assert main(["plan", *options]) == 0
    assert f", {PARAMETERS[script.name]}" in capsys.readouterr().out


def as_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one task of the Slurm script's job sees of its number of ranks."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1024")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_a_configuration_of_pretrain(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What plan accepts here, pretrain accepts too, but for the machine's options."""
    if script.suffix == ".slurm":
        as_under_srun(monkeypatch)
    _, *options = commands(script.read_text())[0]
    if "--gpus" in options:
        at = options.index("--gpus")
        options = options[:at] + options[at + 4 :]
    assert main(["config", "show", "pretrain", *options]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_slurm_script_previews_as_its_comment_says(tmp_path: Path) -> None:
    program = tmp_path / "mtk"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mtk "$@"\n')
    program.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"},
        "ACTION": "plan",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", str(SLURM), "--gpus", "1024", "--gpu", "a100"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "TP 8 x PP 16 x CP 1 x DP 8" in done.stdout and "fits in 80 GB" in done.stdout


def test_slurm_script_books_the_ranks_of_its_layout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SLURM.read_text()
    nodes, tasks = (int(re.search(rf"--{name}=(\d+)", text)[1]) for name in BOOKED)  # type: ignore[index]
    _, *options = commands(text)[0]
    monkeypatch.setenv("SLURM_PROCID", "0")
    for ranks, code in ((nodes * tasks, 0), (nodes * tasks - 24, 2)):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(ranks))
        assert main(["config", "show", "pretrain", *options]) == code
    assert "must be a multiple of TP x PP x CP = 128" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "queued"), [(0, False), (6, False), (130, True)])
def test_slurm_script_is_queued_again_when_its_time_is_up(
    tmp_path: Path, code: int, queued: bool
) -> None:
    for name, line in {
        "srun": '"$@"',
        "mtk": f"exit {code}",
        "scontrol": f"echo $* > {tmp_path}/queued",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", str(SLURM)], env=environment).returncode == code
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"


def test_the_file_of_curate_web_resolves() -> None:
    path = ROOT / "examples" / "curate_web.yaml"
    pipeline = plan_pipeline(path, CURATE_WEB.stages(), CURATE_WEB)
    assert [step.name for step in pipeline.steps] == [step.name for step in CURATE_WEB.steps]
    assert pipeline.steps[0].config.urls.allow_domains == ("github",)


@pytest.mark.parametrize("name", ["end_to_end.yaml", "end_to_end_own_corpus.yaml"])
def test_flow_files_resolve(name: str) -> None:
    path = ROOT / "examples" / name
    pipeline = plan_pipeline(path, registered_stages())
    configs = {step.name: step.config for step in pipeline.steps}
    sections = yaml.safe_load(path.read_text())
    assert set(sections) - {"flow", "check"} <= set(configs)
    assert [*configs][-1] == "serve"
    if "own" in name:
        assert "corpus" not in configs and configs["serve"].load == configs["quantize"].save
    else:
        assert next(iter(configs)) == "corpus" and configs["serve"].load == configs["convert"].save
