"""kill -9 at any moment: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtk.artifacts import open_artifact
from mtk.artifacts.parts import Parts
from mtk.cli.main import main
from tests.curation.commands import STEPS, command, contents, corpus

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("MTK_KILLS", "8"))
PARTS = ("--part-mb", "0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("kills")
    corpus(found, 2)
    for step in STEPS:
        assert main(command(step, found, *PARTS, output=f"whole-{step}/P.jsonl")) == 0
    return found


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it and go on."""


@pytest.mark.parametrize("step", STEPS)
def test_stopped_after_every_part(
    step: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops after each finished part takes as many runs as there are parts; none
    does again what an earlier one has done."""
    output = f"every-{step}/P.jsonl"
    base = command(step, folder, *PARTS, output=output)
    grow, grown = Parts.grow, []

    def once(self: Parts, facts: dict[str, object]) -> object:
        if len(self) > before:
            raise Killed
        grown.append(len(self))
        return grow(self, facts)

    monkeypatch.setattr(Parts, "grow", once)
    before, runs = 0, 0
    while True:
        runs += 1
        assert runs < 100, "it does not get on"
        try:
            assert main(base) == 0
            break
        except Killed:
            before = len(grown)
            assert not (folder / output).exists()
    assert grown == list(range(len(grown))) and runs == len(grown) >= 5
    assert contents(folder / f"every-{step}") == contents(folder / f"whole-{step}")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_moment(step: str, folder: Path) -> None:
    """With two workers, which go too; what was published before the kill is whole."""
    chance = random.Random(f"{step} {KILLS}")
    name = f"killed-{step}"
    arguments = command(step, folder, *PARTS, "--workers", "2", output=f"{name}/P.jsonl")
    expected = contents(folder / f"whole-{step}")
    kills = finished = 0
    longest = 3.0
    while kills < KILLS:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtk", *arguments],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        begun = time.monotonic()
        try:
            process.wait(chance.uniform(0.3, longest))
            assert process.returncode == 0
            longest = time.monotonic() - begun
            finished += 1
            assert contents(folder / name) == expected
            for path in (folder / name).iterdir():
                path.unlink()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if (folder / name / "P.artifact.json").exists():
                open_artifact(folder / name / "P")
    assert main(arguments) == 0
    assert contents(folder / name) == expected
    print(f"{step}: {kills} kills, {finished} runs that ended before theirs")


@pytest.mark.slow
def test_web_goes_on_with_the_step_it_was_killed_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = command("web", folder, *PARTS, output="web/P.jsonl")
    grow = Parts.grow

    def stop(self: Parts, facts: dict[str, object]) -> object:
        if "3_duplicates" in str(self.folder) and len(self) == 2:
            raise Killed
        return grow(self, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "grow", stop)
        with pytest.raises(Killed):
            main(base)
    assert not (folder / "web/P.jsonl").exists()
    capfd.readouterr()
    assert main(base) == 0
    message = capfd.readouterr().err
    assert message.count("is complete, skipped") == 2
    assert not (folder / "web/P.steps").exists()
    found = contents(folder / "web")
    shutil.rmtree(folder / "web")
    assert main(base) == 0
    assert contents(folder / "web") == found
