"""What one rank does from its fork to its end: one job, one answer.

Between launcher and rank runs one connection: the job in, the answer out, and then it stays
open until the launcher lets go, so that no rank closes its sockets while others still read.
When it closes earlier, the launcher is gone and the rank ends at once.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn

from mtk.errors import Interrupted
from mtk.launch.failures import Failure, describe
from mtk.launch.process import find_place, initialise

# A rank that gets it writes its Python stack to stderr, even when it is stuck.
STACK_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Job:
    """call: pickled (function, arguments); the function is called with a Place before them.
    joined: make the process group first and call with the rank instead.
    timeout: of that group. environment: variables of this rank. device: ``cpu`` or ``cuda``."""

    call: bytes
    environment: dict[str, str]
    device: str
    joined: bool = False
    timeout: float = 600.0


@dataclass(frozen=True)
class Returned:
    """A job's value, pickled."""

    value: bytes


def run_rank(connection: int, output: int | None = None) -> NoReturn:
    """Do one job and end the process. output: takes stdout and stderr of a rank that does not
    own the terminal."""
    if output is not None:
        for standard in (1, 2):
            os.dup2(output, standard)
        os.close(output)
    faulthandler.enable(all_threads=False)
    faulthandler.register(STACK_SIGNAL, all_threads=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    pipe = Connection(connection)
    try:
        job: Job = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError, Interrupted, KeyboardInterrupt):
        os._exit(0)  # it was not needed
    watch = threading.Thread(target=_leave_with, args=(pipe,), daemon=True)
    watch.start()
    answer = _do(job)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _flush()
    try:
        pipe.send_bytes(pickle.dumps(answer))
    except OSError:
        os._exit(1)
    watch.join()
    os._exit(1)


def _do(job: Job) -> Returned | Failure:
    try:
        return Returned(pickle.dumps(_call(job)))
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        return describe(error.with_traceback(trace))


def _call(job: Job) -> Any:
    os.environ.update(job.environment)
    function: Callable[..., Any]
    function, arguments = pickle.loads(job.call)
    place = find_place(job.device)
    if not job.joined:
        return function(place, *arguments)
    if place.world > 1:
        initialise(place, job.timeout)
    return function(place.rank, *arguments)


def _leave_with(pipe: Connection) -> None:
    """Wait until the launcher lets go, or is gone."""
    with suppress(EOFError, OSError):
        pipe.recv_bytes()
    _flush()
    os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Until the job's function has handlers of its own."""
    del frame
    raise Interrupted(f"stopped by {signal.Signals(number).name}. Repeat the command.")
