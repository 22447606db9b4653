"""Jobs on ranks that stand ready: results, every way to fail, and the pool goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtk.errors import DataError, WorkerError
from mtk.launch.crew import Crew
from mtk.launch.failures import describe_status
from mtk.launch.pool import RankPool
from mtk.launch.process import find_place
from tests.parallel import jobs

pytestmark = pytest.mark.slow

TIMEOUT = 4.0


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3, preload=[jobs.__name__], timeout=TIMEOUT) as pool:
        yield pool


def seen(rank: int, scale: float) -> dict[str, Any]:
    value = torch.ones(2) * (rank + 1) * scale
    if dist.is_initialized():
        dist.all_reduce(value)
    return {"rank": rank, "value": value, "pid": os.getpid(), "threads": torch.get_num_threads()}


def misbehave(rank: int, culprit: int, how: str) -> None:
    jobs.misbehave_in(jobs.joined_ranks(find_place()), culprit, how)


def patched(rank: int) -> bool:
    """Leaves a mark in its process; True when there was one."""
    before = hasattr(torch, "left_behind")
    torch.left_behind = True  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    return before


def forget(rank: int) -> None:
    """Rank 0 is done while the other still waits for it."""
    ranks = jobs.joined_ranks(find_place())
    jobs.total(ranks)
    if rank:
        jobs.total(ranks)


def test_every_rank_s_value_in_order(pool: RankPool) -> None:
    for world in (1, 3, 2):
        found = pool.run(seen, 2.0, world=world)
        assert [one["rank"] for one in found] == list(range(world))
        total = 2.0 * sum(range(1, world + 1))
        assert all(torch.equal(one["value"], torch.full((2,), total)) for one in found)
        assert {one["threads"] for one in found} == {1}


def test_no_job_sees_what_another_left(pool: RankPool) -> None:
    assert pool.run(patched, world=2) == [False, False]
    assert pool.run(patched, world=2) == [False, False]
    assert pool.run(seen, 1.0, world=2)[0]["value"].dtype == torch.float32


FAILURES = [
    ("raise", r"\Arank 1 failed:\n\[rank 1\] Traceback[^$]*ValueError: the seventh brick is loose"),
    ("kill", r"\Arank 1 was killed by SIGKILL \(often .*memory"),
    ("exit", r"\Arank 1 ended with exit status 3 without a result"),
    ("segfault", r"\Arank 1 was killed by SIGSEGV[^$]*\[rank 1\].* in fail\n"),
]


@pytest.mark.parametrize(("how", "words"), FAILURES)
def test_the_first_failure_comes_first(pool: RankPool, how: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=words) as caught:
        pool.run(misbehave, 1, how, world=3)
    assert time.monotonic() - started < TIMEOUT + 3
    assert caught.value.exit_code == 6
    text = str(caught.value)
    assert "[rank 0]" not in text and "[rank 2]" not in text
    assert "rank_process.py" not in text.partition("Last lines")[0]
    # A rank that raised keeps its connections until the job is over.
    others = "were ended" if how == "raise" else "lost their peer"
    assert f"Of the other ranks: 0, 2 {others}." in text
    assert "[rank 1] about to " + how in text
    assert pool.run(patched, world=3) == [False] * 3


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("loop", "it was last seen in 'data.next'"),
        ("stop", "s ago and is stopped (SIGSTOP)"),
        ("deaf", "it was last seen in 'data.next'"),
    ],
)
def test_a_missing_rank_is_named(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch, how: str, what: str
) -> None:
    """The backend gives up after the timeout."""
    monkeypatch.setattr(pool, "_timeout", 1.5)
    with pytest.raises(WorkerError) as caught:
        pool.run(misbehave, 1, how, world=3)
    text = str(caught.value)
    assert text.startswith("rank 1 never entered 'tp.row' (group tp: ranks 0, 1, 2; call 2); ")
    assert what in text
    assert "ranks 0, 2 waited " in text
    if how != "stop":
        # The Python stack of the rank that hangs.
        assert "in fail" in text


def test_the_crew_ends_a_hang_that_the_backend_does_not(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Crew, "start", _patient(Crew.start))
    monkeypatch.setattr(pool, "_timeout", 1.0)
    words = r"\Aa collective did not end within 1 s .*: rank 2 never entered 'tp.row' \(group tp: "
    with pytest.raises(WorkerError, match=words):
        pool.run(misbehave, 2, "loop", world=3)


def _patient(start: Any) -> Any:
    """The ranks' backend waits far longer than the crew."""

    def patient(crew: Any, *arguments: Any, **options: Any) -> None:
        timeout, crew._timeout = crew._timeout, 60.0
        start(crew, *arguments, **options)
        crew._timeout = timeout

    return patient


def test_a_rank_that_is_done_too_early(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_timeout", 1.0)
    with pytest.raises(WorkerError, match=r"rank 0 never entered .*; it has finished its work; "):
        pool.run(forget, world=2)


def test_a_job_over_its_limit(pool: RankPool) -> None:
    with pytest.raises(WorkerError, match=r"longer than its limit of 1.5 s: [^$]*in fail"):
        pool.run(misbehave, 0, "loop", world=1, limit=1.5)
    assert len(pool.run(seen, 1.0, world=2)) == 2


def test_an_error_for_users_stays_itself(pool: RankPool) -> None:
    with pytest.raises(DataError, match="byte 7") as caught:
        pool.run(misbehave, 1, "data", world=2)
    assert "[rank 1] " in str(caught.value.__cause__)
    with pytest.raises(DataError, match="line 1, byte 2"):
        pool.run(misbehave, 0, "unpickle", world=2)


def test_a_value_that_cannot_be_carried(pool: RankPool) -> None:
    with pytest.raises(WorkerError, match=r"rank 0 failed:[^$]*pickle"):
        pool.run(jobs.unpicklable, world=1)


def test_nothing_stays_after_close() -> None:
    with RankPool(2, preload=[jobs.__name__]) as other:
        pids = [one["pid"] for one in other.run(seen, 1.0, world=2)]
        session = os.getsid(other._spare[0].process) if other._spare[0].process else 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*pids, session) if pid)
    other.close()


def test_too_many_ranks(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="up to 3"):
        pool.run(seen, 1.0, world=4)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (9, "SIGKILL"),
        (6 | 0x80, "SIGABRT (often NCCL's watchdog"),
        (3 << 8, "exit status 3"),
        (64, "SIGRTMAX"),
        (40, "signal 40"),
    ],
)
def test_statuses(status: int, words: str) -> None:
    assert words in describe_status(status)
