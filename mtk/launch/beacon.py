"""Where no launcher of mtk's watches (torchrun, Slurm), ranks tell each other what they do.

A thread of every rank publishes its trace to the job's store every few seconds; the first rank
whose collective fails reads them all and names the missing one. When the backend itself does
not end a collective, the thread does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from mtk.errors import WorkerError
from mtk.launch.hang import RankState, explain
from mtk.launch.trace import Sight, SlotTrace

# Seconds beyond the timeout in which the backend may report by itself.
GRACE = 15.0


class Beacon:
    """Publishes ``trace`` while the block runs. end: called with the message when a collective
    outlives ``timeout`` and the backend does not end it; it must not return."""

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store,
        trace: SlotTrace,
        timeout: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._rank, self._world, self._store, self._trace = rank, world, store, trace
        self._limit = timeout + min(GRACE, timeout)
        self._interval = min(10.0, max(0.2, timeout / 20))
        self._silence = max(2.0, 3 * self._interval)
        self._end = end or _end_process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beacon", daemon=True)

    def __enter__(self) -> Beacon:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(2.0)
        self._publish("had ended" if error is None else f"failed ({kind.__name__ if kind else ''})")

    def report(self, error: BaseException) -> str:
        """Why a collective of this rank failed, as far as the other ranks can be read."""
        found = explain(self._states())
        cause = str(error).strip().splitlines()
        return (
            f"rank {self._rank} lost the others: {found or 'nothing is known of them'}. "
            f"The backend says: {cause[0] if cause else type(error).__name__}"
        )

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            if not self._publish():
                return
            seen = self._trace.sight()
            if seen.inside and seen.age > self._limit:
                self._end(
                    f"rank {self._rank} gave up after {seen.age:.0f} s "
                    f"(--distributed-timeout-minutes): {explain(self._states())}."
                )

    def _publish(self, gone: str = "") -> bool:
        seen = self._trace.sight()
        note = {
            "sight": asdict(seen),
            "members": self._trace.groups.get(seen.group, ()),
            "time": time.time(),
            "gone": gone,
        }
        try:
            self._store.set(f"rank/{self._rank}", json.dumps(note))
        except (dist.DistError, RuntimeError):
            return False  # the store went with its host; nobody can read it any more
        return True

    def _states(self) -> dict[int, RankState]:
        self._publish()
        states = {}
        for rank in range(self._world):
            try:
                known = self._store.check([f"rank/{rank}"])
                note = json.loads(self._store.get(f"rank/{rank}")) if known else None
            except (dist.DistError, RuntimeError):
                note = None
            states[rank] = _state(note, self._silence) if note else RankState()
        return states


def _state(note: dict[str, object], silence: float) -> RankState:
    """What a rank published, its ages brought up to now by the machines' clocks; a rank that
    published nothing for ``silence`` seconds is stopped or lost."""
    fields, published, members = note["sight"], note["time"], note["members"]
    assert isinstance(fields, dict) and isinstance(published, float) and isinstance(members, list)
    seen = Sight(**fields)
    past = max(0.0, time.time() - published)
    seen = replace(seen, age=seen.age + past, phase_age=seen.phase_age + past)
    groups = {seen.group: tuple(members)} if members else {}
    gone = str(note["gone"])
    if past > silence and not gone:
        gone = f"has given no sign of life for {past:.0f} s (stopped, or its machine is lost)"
    return RankState(seen, groups, gone)


def _end_process(message: str) -> None:
    """From a thread, while the main thread hangs in native code: no clean-up can run."""
    print(f"mtk: {WorkerError.kind} error: {message}", file=sys.stderr, flush=True)
    os._exit(WorkerError.exit_code)
