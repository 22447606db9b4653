"""``python -m flows.guard PARENT COMMAND...``: become COMMAND, but die with PARENT.

On Linux the kernel sends SIGTERM when the parent goes, however it went (kill -9, out
of memory). Elsewhere the command runs unguarded and only orderly ends stop it. This is
a program and not a ``preexec_fn``, which may deadlock in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1


def start_guarded(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``command`` as a child that does not outlive this process.

    It gets a session of its own, so that Ctrl-C reaches only the parent, which then
    stops it in order. output: where its stdout and stderr go.
    """
    # The guard is found whatever folder the user is in.
    root = str(Path(__file__).parents[1])
    variables = dict(os.environ if environment is None else environment)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "flows.guard", str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=variables,
        start_new_session=True,
    )


def stop(child: subprocess.Popen[bytes], patience: float = 10.0) -> int:
    """SIGTERM, then SIGKILL after ``patience`` seconds; returns the exit status."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when ``parent``, which started this process, is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)  # it died before the request above


def main(arguments: Sequence[str]) -> None:
    """Replace this process by the command. Does not return."""
    parent, command = int(arguments[0]), list(arguments[1:])
    die_with_parent(parent)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
