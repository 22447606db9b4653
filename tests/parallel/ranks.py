"""Run a function on several ranks: forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", __name__]
TIMEOUT = 120.0


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` on ``world`` gloo ranks; their results in order.

    function: of a module, as ranks import it. Raises AssertionError with the traceback of
    the first rank that fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        started = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(theirs, store, rank, world, function, args), daemon=True
            )
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            return [_receive(rank, pipe) for rank, (_, pipe) in enumerate(started)]
        finally:
            for process, _ in started:
                process.kill()
                process.join()


def _receive(rank: int, pipe: Connection) -> Any:
    if not pipe.poll(TIMEOUT):
        raise AssertionError(f"rank {rank} did not answer within {TIMEOUT:.0f} s")
    try:
        failed, value = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    if failed:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def _rank(
    pipe: Connection, store: str, rank: int, world: int, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        pipe.send((False, function(rank, *args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
