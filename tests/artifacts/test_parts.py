"""Parts of a long work survive a kill and never mix with other work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtk.artifacts.parts import Parts, parts_folder
from mtk.errors import ArtifactError


def grown(parts: Parts, text: str) -> None:
    facts: dict[str, Any] = {}
    with parts.grow(facts) as folder:
        (folder / "data").write_text(text)
        facts["size"] = len(text)


def test_goes_on_after_the_finished_parts(tmp_path: Path) -> None:
    with Parts(tmp_path / "out", "a") as parts:
        grown(parts, "one")
        grown(parts, "three")
    with Parts(tmp_path / "out", "a") as parts:
        assert parts.facts == [{"size": 3}, {"size": 5}]
        assert (parts.part(1) / "data").read_text() == "three"
        parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_work_are_thrown_away(tmp_path: Path) -> None:
    with Parts(tmp_path / "out", "a") as parts:
        grown(parts, "one")
    with Parts(tmp_path / "out", "b") as parts:
        assert len(parts) == 0
    with Parts(tmp_path / "out", "a") as parts:
        assert len(parts) == 0


def test_a_part_that_failed_does_not_count(tmp_path: Path) -> None:
    with Parts(tmp_path / "out", "a") as parts:
        grown(parts, "one")
        with pytest.raises(RuntimeError), parts.grow({}) as folder:
            (folder / "data").write_text("tw")
            raise RuntimeError
        assert len(parts) == 1
        grown(parts, "two")
    with Parts(tmp_path / "out", "a") as parts:
        assert len(parts) == 2
        assert (parts.part(1) / "data").read_text() == "two"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Parts(tmp_path / "out", "a"), pytest.raises(ArtifactError, match="another process"):
        Parts(tmp_path / "out", "a").__enter__()
    with Parts(tmp_path / "out", "a"):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mtk.artifacts.parts import Parts\n"
        "with Parts(sys.argv[1], 'a') as parts:\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ArtifactError):
            Parts(tmp_path / "out", "a").__enter__()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with Parts(tmp_path / "out", "a"):
        pass


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        Parts(tmp_path / "file" / "out", "a").__enter__()
    assert parts_folder("x/out") == Path("x/.out.parts")
