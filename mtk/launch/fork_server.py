"""A process that has torch loaded and forks ranks on request.

It is a fresh interpreter that never runs a tensor operation nor touches CUDA, so forking it is
safe and takes about 15 ms. It owns the ranks: it collects how they end, and when the process
that asked for them is gone, however that ended, it kills them all with everything they
started, since they share a session of their own. That session also keeps Ctrl-C away from
them: the launcher decides who hears of it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import select
import shutil
import signal
import socket
import struct
import sys
import warnings
from collections.abc import Sequence

from mtk.launch.rank_process import run_rank

# kind, process id, wait status
EVENT = struct.Struct("<cii")
FORKED, ENDED = b"F", b"E"
PR_SET_PDEATHSIG = 1
# What ranks that train need.
PRELOAD = ("torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "torch._dynamo")
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def serve(descriptor: int, launcher: int, preload: Sequence[str], folder: str) -> None:
    """Serve requests on the socket ``descriptor`` until its other end closes. Never returns.

    A request is one byte with one or two file descriptors: a rank's connection and, for ranks
    that do not own the terminal, where their output goes. Answers are ``EVENT`` records.
    preload: modules that are imported first. folder: removed at the end.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    for name in preload:
        try:
            importlib.import_module(name)
        except Exception:  # the rank meets it again, and can tell the launcher
            continue
    # Collected once: pages of frozen objects stay shared between all ranks.
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=descriptor)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    ranks: set[int] = set()
    try:
        while os.getppid() == launcher:
            ready, _, _ = select.select([descriptor, wake_read], [], [], 0.5)
            if wake_read in ready:
                os.read(wake_read, 4096)
            _collect(ranks, requests)
            if descriptor in ready and not _fork(ranks, requests, (wake_read, wake_write)):
                break
    except OSError:
        pass  # the launcher is gone
    finally:
        _end(ranks, folder)


def _fork(ranks: set[int], requests: socket.socket, own: tuple[int, int]) -> bool:
    """Answer one request; False when the launcher closed its end."""
    request, descriptors, _, _ = socket.recv_fds(requests, 1, 2)
    if not request:
        return False
    server = os.getpid()
    with warnings.catch_warnings():
        # Python warns where libraries started threads; none of them holds a lock here.
        warnings.simplefilter("ignore")
        process = os.fork()
    if process == 0:
        try:
            _become_rank(server, requests, own)
            run_rank(*descriptors)
        finally:
            os._exit(70)  # run_rank ends the process itself
    for descriptor in descriptors:
        os.close(descriptor)
    ranks.add(process)
    requests.sendall(EVENT.pack(FORKED, process, 0))
    return True


def _become_rank(server: int, requests: socket.socket, own: tuple[int, int]) -> None:
    """Undo what belongs to the server, and die with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    for number in (*_IGNORED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    requests.close()
    for descriptor in own:
        os.close(descriptor)


def _collect(ranks: set[int], requests: socket.socket) -> None:
    """Tell how ranks ended."""
    for process in sorted(ranks):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            ranks.discard(process)
            requests.sendall(EVENT.pack(ENDED, process, status))


def _end(ranks: set[int], folder: str) -> None:
    """End the ranks, then the session with whatever they started, and this process."""
    for process in ranks:
        os.kill(process, signal.SIGKILL)
    for process in ranks:
        os.waitpid(process, 0)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
