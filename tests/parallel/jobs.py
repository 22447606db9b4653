"""Functions that tests run on ranks, and a small program that launches one of them.

``python -m tests.parallel.jobs FUNCTION NPROC TIMEOUT [ARGUMENT...]`` behaves as ``mtk`` does:
errors without traceback, documented exit codes. NPROC 0: the place comes from the environment.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mtk.errors import DataError, Interrupted, MtkError
from mtk.launch.local import launch
from mtk.launch.process import Place, find_place, join, own_trace
from mtk.parallel.collectives import all_reduce
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Trace
from mtk.parallel.ranks import Ranks, make_ranks


def ranks_of(place: Place, trace: Trace) -> Ranks:
    """All ranks as one tensor-parallel group."""
    return make_ranks(
        Dims(tp=place.world),
        rank=place.rank,
        device=place.device,
        trace=trace,
    )


def total(ranks: Ranks) -> float:
    """A collective: the sum of rank + 1."""
    return all_reduce(
        torch.tensor(ranks.rank + 1.0, device=ranks.device), ranks.tp, "tp.row"
    ).item()


def add_up(place: Place, timeout: float, *steps: str) -> dict[str, Any]:
    with join(place, timeout) as trace:
        value = total(ranks_of(place, trace))
    return {
        "total": value,
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "session": os.getsid(0),
    }


def misbehave(place: Place, timeout: float, culprit: str, how: str) -> None:
    with join(place, timeout) as trace:
        misbehave_in(ranks_of(place, trace), int(culprit), how)


def misbehave_in(ranks: Ranks, culprit: int, how: str) -> None:
    """Rank ``culprit`` does ``how`` after a first collective; the others go on."""
    total(ranks)
    ranks.trace.phase("data.next")
    if ranks.rank == culprit:
        fail(how)
    total(ranks)


def joined_ranks(place: Place) -> Ranks:
    """On a rank of a pool, which has joined the others already."""
    return ranks_of(place, own_trace(place))


def unpicklable(rank: int) -> Any:
    return lambda: rank


def fail(how: str) -> None:
    print(f"about to {how}", file=sys.stderr, flush=True)
    if how == "raise":
        raise ValueError("the seventh brick is loose")
    if how == "data":
        raise DataError("corpus.bin: byte 7 is not what it claims to be.")
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "unpickle":
        raise OddError(1, 2)
    while how in ("loop", "deaf"):
        if how == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


class OddError(DataError):
    """Its constructor does not take what pickle gives it."""

    def __init__(self, line: int, byte: int) -> None:
        super().__init__(f"line {line}, byte {byte}")


def train(place: Place, timeout: float, folder: str, save: str) -> None:
    """Like the training loop: every step is a collective, a signal is honoured between steps
    and saved."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    with join(place, timeout) as trace:
        ranks = ranks_of(place, trace)
        for step in range(10_000):
            flag = torch.tensor(float(bool(asked)))
            if all_reduce(flag, ranks.world, "loop.stop", "max").item():
                Path(folder, f"saving{place.rank}").touch()
                time.sleep(float(save))
                Path(folder, f"saved{place.rank}").write_text(f"{step} {len(asked)}")
                raise Interrupted(f"saved step {step}.")
            if step == 0:
                pid = Path(folder, f"{place.rank}.tmp")
                pid.write_text(str(os.getpid()))
                pid.rename(Path(folder, f"pid{place.rank}"))
            time.sleep(0.02)


def stop_at_leisure(place: Place, timeout: float, folder: str, seconds: str) -> None:
    """Rank 0 needs longer than the others for what it does after a signal."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    Path(folder, f"pid{place.rank}").touch()
    while not asked:
        time.sleep(0.02)
    if place.rank == 0:
        time.sleep(float(seconds))
        Path(folder, "drawn").touch()
    raise Interrupted(f"rank {place.rank} stopped.")


def disk(place: Place, number: int) -> None:
    if place.rank == 0:
        raise OSError(number, os.strerror(number), "x/metrics.jsonl")
    time.sleep(60)


def restart_once(place: Place, timeout: float, folder: str) -> dict[str, Any]:
    """Counts steps in a file as a checkpoint; the first attempt dies in the middle."""
    checkpoint = Path(folder, "checkpoint")
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with join(place, timeout) as trace:
        ranks = ranks_of(place, trace)
        for step in range(start, 4):
            total(ranks)
            if place.rank == 0:
                checkpoint.write_text(str(step + 1))
            if place.rank == 1 and start == 0 and step == 2:
                raise RuntimeError("a node was lost")
    return {"start": start, "total": place.world}


def main(arguments: list[str]) -> int:
    # Ranks import the function from its module, not from the program that runs.
    function = getattr(importlib.import_module("tests.parallel.jobs"), arguments[0])
    nproc, timeout, more = int(arguments[1]), float(arguments[2]), arguments[3:]
    try:
        if nproc:
            value = launch(function, (timeout, *more), nproc, timeout=timeout)
        else:
            value = function(find_place(), timeout, *more)
        print("RESULT", json.dumps(value), flush=True)
        return 0
    except MtkError as error:
        print(f"mtk: {error.kind} error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
