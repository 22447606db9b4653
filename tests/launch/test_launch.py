"""mtk's launcher: results, signals, and nobody left behind. Failures of ranks are in
test_pool.py, where they cost less."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtk.errors import EXIT_CODES, ArtifactError, Interrupted, LayoutError, WorkerError
from mtk.launch.crew import pickle_call
from mtk.launch.local import launch
from mtk.launch.verdict import Record, verdict
from tests.parallel import jobs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``python -m tests.parallel.jobs ...`` as a program of its own."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.parallel.jobs", *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield run
    for program in started:
        program.kill()
        program.communicate()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def members_of(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def job_folders(server: int) -> list[str]:
    """The temporary folders on the command line of a fork server."""
    words = Path(f"/proc/{server}/cmdline").read_text().split("\0")
    return [word for word in words if "mtk-job-" in word]


def session_of_ranks(folder: Path) -> int:
    """The session in which the ranks of ``jobs.train`` run."""
    wait_for(lambda: all((folder / f"pid{rank}").exists() for rank in (0, 1)))
    time.sleep(0.1)
    return os.getsid(int((folder / "pid0").read_text()))


def test_result_of_rank_0_comes_back_and_nothing_stays() -> None:
    value = launch(jobs.add_up, (20.0,), 3, timeout=20.0)
    assert value["total"] == 6
    assert value["session"] != os.getsid(0)
    assert members_of(value["session"]) == []


def test_a_rank_s_own_error_is_the_program_s(start: Callable[..., subprocess.Popen[str]]) -> None:
    program = start("misbehave", 2, 20, 1, "data")
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (3, "")
    assert err == "mtk: data error: corpus.bin: byte 7 is not what it claims to be.\n"


def test_a_signal_reaches_every_rank_once_and_the_launcher_waits(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    program = start("train", 2, 20, tmp_path, 0.3)
    session = session_of_ranks(tmp_path)
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=30)
    assert program.returncode == 130, EXIT_CODES
    assert re.fullmatch(r"mtk: interrupted error: saved step \d+\.\n", err)
    saved = [(tmp_path / f"saved{rank}").read_text().split() for rank in (0, 1)]
    assert saved[0] == saved[1]
    assert saved[0][1] == "1"
    assert members_of(session) == []


def test_a_second_interrupt_does_not_wait(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    program = start("train", 2, 60, tmp_path, 50)
    session = session_of_ranks(tmp_path)
    program.send_signal(signal.SIGINT)
    wait_for((tmp_path / "saving0").exists)
    assert program.poll() is None
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=10)
    assert program.returncode == 130
    assert not (tmp_path / "saved0").exists()
    assert members_of(session) == []


def test_a_second_sigterm_ends_ranks_that_do_not_stop(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """One that comes at once is the same request: timeout(1) delivers each signal twice."""
    program = start("train", 2, 60, tmp_path, 50)
    session = session_of_ranks(tmp_path)
    program.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "saving0").exists)
    program.send_signal(signal.SIGTERM)
    time.sleep(1.1)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=10)
    assert program.returncode == 130
    assert "a second SIGTERM ended the ranks" in err
    assert not (tmp_path / "saved0").exists()
    assert members_of(session) == []


def test_ranks_that_stop_finish_what_follows(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The first answer to a signal does not end a rank that still draws its plots."""
    program = start("stop_at_leisure", 2, 20, tmp_path, 4)
    wait_for(lambda: all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)))
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=30)
    assert (program.returncode, err) == (130, "mtk: interrupted error: rank 0 stopped.\n")
    assert (tmp_path / "drawn").exists()


@pytest.mark.parametrize("status", [0, 70 << 8, int(signal.SIGTERM)])
def test_a_rank_that_ends_without_an_answer_after_a_signal_was_interrupted(status: int) -> None:
    """The signal met it before it had its job, or after it had finished."""
    records = {0: Record(0, status=status), 1: Record(1, ended_by_us=True)}
    assert isinstance(verdict([records[0]], records, stop=signal.SIGTERM), Interrupted)
    assert isinstance(verdict([records[0]], records), WorkerError)


def test_a_full_disk_is_no_crash_of_a_rank() -> None:
    """The same kind of error, and so the same exit code, as of one process."""
    with pytest.raises(ArtifactError, match=r"^x/metrics\.jsonl: No space left on device\.$"):
        launch(jobs.disk, (errno.ENOSPC,), 2, timeout=20.0)


def test_no_rank_survives_a_killed_launcher(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    program = start("train", 2, 60, tmp_path, 0)
    session = session_of_ranks(tmp_path)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGSTOP)
    folders = [Path(line) for line in job_folders(session)]
    assert folders and all(folder.is_dir() for folder in folders)
    program.kill()
    wait_for(lambda: members_of(session) == [], 2.0)
    assert not any(folder.exists() for folder in folders)


def test_no_rank_survives_a_killed_server(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    program = start("train", 2, 60, tmp_path, 0)
    session = session_of_ranks(tmp_path)
    os.kill(session, signal.SIGKILL)
    _, err = program.communicate(timeout=30)
    assert program.returncode == 6
    assert "process that starts ranks ended" in err
    wait_for(lambda: members_of(session) == [], 2.0)


def test_functions_that_ranks_cannot_import() -> None:
    def local() -> None: ...

    with pytest.raises(TypeError, match="top of a module"):
        pickle_call(local, ())


def test_fewer_gpus_than_ranks() -> None:
    with pytest.raises(LayoutError, match="99 ranks on this machine need a GPU each"):
        launch(jobs.add_up, (1.0,), 99, device="cuda")


def test_torchrun_restarts_from_the_checkpoint(tmp_path: Path) -> None:
    done = torchrun("--max-restarts", "1", "restart_once", 0, 20, tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads(text) for text in re.findall(r"RESULT (\{.*?\})", done.stdout)]
    assert results == [{"start": 3, "total": 2}] * 2
    assert "RuntimeError: a node was lost" in done.stderr


def test_torchrun_names_the_missing_rank() -> None:
    done = torchrun("misbehave", 0, 5, 1, "stop")
    assert done.returncode != 0
    assert re.search(
        r"mtk: worker error: rank 0 lost the others: rank 1 never entered 'tp.row' \(group tp: "
        r"ranks 0, 1; call 2\); it has given no sign of life for \d+ s",
        done.stderr,
    ), done.stderr


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks; options of torchrun come before the name of the function."""
    words = list(map(str, arguments))
    options = words[:2] if words[0].startswith("--") else []
    program = ["-m", "tests.parallel.jobs", *words[len(options) :]]
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*runner, "--nproc-per-node", "2", *options, *program]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
