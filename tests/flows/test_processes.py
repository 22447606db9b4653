"""Children die with their parent; a killed flow continues; the program's exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.guard import start_guarded, stop
from flows.pipeline import plan_pipeline
from flows.settings import DEFAULTS, prefect_environment
from tests.flows.fake_stages import fake_stages

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from flows.pipeline import plan_pipeline
from flows.runner import run_plain
from mtk.log import Reporter
from mtk.session import Session
from tests.flows.fake_stages import fake_stages
run_plain(plan_pipeline("flow.yaml", fake_stages()), Session(Reporter()))
assert "prefect" not in sys.modules
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="the guard is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_child_dies_with_its_parent(number: signal.Signals) -> None:
    program = (
        "import sys, time; from flows.guard import start_guarded;"
        "child = start_guarded([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)  # long enough for the child to have become its command
        assert alive(child)
        parent.send_signal(number)
    assert gone(child)


def test_stop_ends_even_a_child_that_ignores_sigterm() -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    child = start_guarded([sys.executable, "-c", program])
    time.sleep(1.0)
    assert stop(child, patience=0.5) == -signal.SIGKILL


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("stage", ["corpus", "preprocess", "pretrain", "quantize"])
def test_killed_flow_continues_with_the_same_digests(stage: str, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        (folder / "flow.yaml").write_text("flow: {work: work, leave_out: [serve]}\n")
    assert run(straight).returncode == 0
    plan = {"stage": stage, "how": "sigkill", "times": 1}
    (killed / "fail.json").write_text(json.dumps(plan))
    assert run(killed).returncode == -signal.SIGKILL
    done = run(killed)
    assert done.returncode == 0, done.stderr
    assert (killed / "ran.txt").read_text() == (straight / "ran.txt").read_text()
    markers = sorted(path.relative_to(straight) for path in straight.rglob("*artifact.json"))
    assert len(markers) == len(fake_stages())
    for marker in markers:
        digests = [json.loads((root / marker).read_text())["digest"] for root in (straight, killed)]
        assert digests[0] == digests[1]
    assert not list(killed.rglob("*.partial-*"))


def test_environment_is_set_before_prefect_and_the_user_wins(tmp_path: Path) -> None:
    environment = {"DO_NOT_TRACK": "0", "PREFECT_HOME": str(tmp_path / "mine")}
    assert prefect_environment(environment) == tmp_path / "mine"
    assert environment["DO_NOT_TRACK"] == "0"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert set(DEFAULTS) <= set(environment)
    assert prefect_environment(environment, str(tmp_path / "option")) == tmp_path / "option"


def test_planning_imports_neither_prefect_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "flow.yaml").write_text("flow: {leave_out: [serve]}\n")
    assert plan_pipeline(tmp_path / "flow.yaml", fake_stages()).steps
    probe = (
        "from mtk.cli.main import main; import sys;"
        f"code = main(['flow', 'run', 'end_to_end', '--dry-run', '--config',"
        f" {str(ROOT / 'examples' / 'end_to_end.yaml')!r}]);"
        "print(code, [m for m in ('torch', 'prefect') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
