"""Workers that die, signals, memory: nothing hangs and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtk.data.encoding import EncodingPlan, encode_chunks
from mtk.data.sources import Chunk
from mtk.data.workers import IN_FLIGHT, choose_workers, usable_cores
from mtk.errors import WorkerError
from tests.preprocess.corpora import command, tokenizer_in

pytestmark = pytest.mark.slow


class Deadly:
    """A splitter that kills its process at a certain text; stands in for the OOM killer."""

    def split(self, text: str) -> list[str]:
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "fail":
            raise MemoryError
        return [text]

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Deadly)


def chunks(texts: list[str]) -> Iterator[Chunk]:
    for number, text in enumerate(texts, start=1):
        record = json.dumps({"text": text}).encode()
        yield Chunk("f", "line", (record,), (number,), (0,), False, 0)


@pytest.mark.parametrize(("text", "words"), [("die", "died"), ("fail", "MemoryError")])
def test_a_dead_worker_is_an_error_not_a_hang(tmp_path: Path, text: str, words: str) -> None:
    tokenizer_in(tmp_path)
    plan = EncodingPlan(str(tmp_path / "tok"), ("text",), False, Deadly())
    texts = ["fine"] * 5 + [text] + ["fine"] * 50
    with pytest.raises(WorkerError, match=words):
        list(encode_chunks(chunks(texts), plan, 2))


def test_few_chunks_are_in_flight(tmp_path: Path) -> None:
    """The reader is never far ahead of the writer: memory does not grow with the corpus."""
    tokenizer_in(tmp_path)
    plan = EncodingPlan(str(tmp_path / "tok"), ("text",), False)
    taken = 0

    def counting() -> Iterator[Chunk]:
        nonlocal taken
        for chunk in chunks(["text"] * 100):
            taken += 1
            yield chunk

    ahead = [taken - index for index, _ in enumerate(encode_chunks(counting(), plan, 2))]
    assert len(ahead) == 100
    assert max(ahead) <= IN_FLIGHT * 2


def test_choice_of_workers() -> None:
    assert choose_workers(None, [1000]) == 1
    assert choose_workers(7, [1000]) == 7
    assert choose_workers(None, [1 << 40]) == usable_cores()


def large_corpus(folder: Path) -> None:
    line = json.dumps({"text": "some words that take a while to encode " * 50}) + "\n"
    with (folder / "c.jsonl").open("w") as stream:
        for _ in range(60_000):
            stream.write(line)


def start(folder: Path) -> subprocess.Popen[str]:
    arguments = command(folder, "--workers", "2", "--split-sentences")
    process = subprocess.Popen(
        [sys.executable, "-m", "mtk", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs this in the background ignores Ctrl-C; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not list((folder / "out").glob(".P.parts/*.bin")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    return process


def members(session: int) -> list[int]:
    """Living processes of the session (zombies left out)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_leave_nothing(tmp_path: Path, number: signal.Signals) -> None:
    large_corpus(tmp_path)
    process = start(tmp_path)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, message = process.communicate(timeout=60)
    limit = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < limit:
        time.sleep(0.1)
    assert members(process.pid) == []
    assert "Traceback" not in message
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    program = (
        "import sys; from mtk.cli.main import main; code = main(sys.argv[1:]);"
        "peak = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0];"
        "print(int(peak.split()[1]) // 1024, file=sys.stderr);"
        "sys.exit(code)"
    )
    peaks = []
    for count in (2_000, 40_000):
        line = json.dumps({"text": f"{count} words of a document " * 40}) + "\n"
        (tmp_path / "c.jsonl").write_text(line * count)
        prefix = str(tmp_path / f"out{count}" / "P")
        done = subprocess.run(
            [sys.executable, "-c", program, *command(tmp_path, "--output-prefix", prefix)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stderr.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 40, f"peak memory in MiB: {peaks}"
