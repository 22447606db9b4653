"""kill -9 at any moment: the same command finishes, and its bytes are those of one run.

The file is a program too: ``python tests/curation/test_wiki_kill.py MOMENTS`` tries as many.
"""

from __future__ import annotations

import bz2
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mtk.artifacts.parts import parts_folder
from mtk.cli.main import main
from tests.curation.test_wiki_dump import multistream
from tests.curation.wiki_dumps import dump, many_pages

MOMENTS = 8
NAMES = ("w.jsonl.gz", "w.dropped.jsonl")


def command(folder: Path, output: Path) -> list[str]:
    options = ["--input", str(folder / "d.xml.bz2"), "--output", str(output / "w.jsonl.gz")]
    return ["curate", "wikipedia", *options, "--workers", "2", "--part-pages", "200"]


def digests(output: Path) -> list[str]:
    return [hashlib.sha256((output / name).read_bytes()).hexdigest() for name in NAMES]


def killed_after(folder: Path, output: Path, seconds: float) -> int | None:
    """The exit status of a run killed with its children; None if it was over before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mtk", *command(folder, output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(timeout=seconds)
        assert status == 0
        return None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def try_moments(folder: Path, count: int, seed: int, streams: bool) -> tuple[int, int, int]:
    """(kills, outputs finished after them, parts that successors found); every output's digests
    are compared with those of a run that was not killed."""
    data = dump(many_pages(3000))
    (folder / "d.xml.bz2").write_bytes(multistream(data) if streams else bz2.compress(data))
    start = time.monotonic()
    assert killed_after(folder, folder / "whole", 300) is None
    lasting = time.monotonic() - start
    expected = digests(folder / "whole")
    chance = random.Random(seed)
    kills = finished = found = 0
    while kills < count:
        output = folder / f"{finished}"
        while killed_after(folder, output, chance.uniform(0.2, lasting)) is not None:
            kills += 1
            parts = parts_folder(output / "w")
            found += len(list(parts.glob("0*"))) if parts.is_dir() else 0
        finished += 1
        assert digests(output) == expected, f"after {kills} kills"
        assert sorted(p.name for p in output.iterdir()) == ["w.artifact.json", *sorted(NAMES)]
    return kills, finished, found


@pytest.mark.slow
@pytest.mark.parametrize("streams", [True, False])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, streams: bool) -> None:
    kills, _, found = try_moments(tmp_path, MOMENTS // 2, seed=3 + streams, streams=streams)
    assert kills >= MOMENTS // 2 and found > 0


@pytest.mark.slow
def test_ctrl_c_and_sigterm_keep_the_work(tmp_path: Path) -> None:
    (tmp_path / "d.xml.bz2").write_bytes(bz2.compress(dump(many_pages(6000))))
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "mtk", *command(tmp_path, output)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    limit = time.monotonic() + 60
    while not (parts_folder(output / "w") / "00000001").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.terminate()
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130 and "Repeat the command" in message
    assert [path.name for path in output.iterdir()] == [".w.parts"]
    assert main(command(tmp_path, output)) == 0
    assert main(command(tmp_path, tmp_path / "whole")) == 0
    assert digests(output) == digests(tmp_path / "whole")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(try_moments(Path(name), int(sys.argv[1]), seed=int(time.time()), streams=True))
