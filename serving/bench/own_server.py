"""``mtk serve`` as a child of the benchmark, on a free port."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from mtk.config.bench_serve import ServerUnderTest
from mtk.errors import ArtifactError, ConfigError, DataError, MtkError, WorkerError

KINDS: dict[int, type[MtkError]] = {2: ConfigError, 3: DataError, 4: ArtifactError}


class Start(Protocol):
    """Starts a child that does not outlive its parent."""

    def __call__(
        self, command: list[str], *, output: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]: ...


@contextmanager
def own_server(
    config: ServerUnderTest, start: Start, stop: Callable[[subprocess.Popen[bytes]], int]
) -> Iterator[str]:
    """The URL of the server, while the block runs.

    Raises what the server itself ended with, or WorkerError if it does not come up in time.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        ready = Path(folder) / "ready"
        command = [sys.executable, "-m", "mtk", "serve", "--load", config.load or ""]
        command += ["--host", "127.0.0.1", "--port", "0", "--ready-file", str(ready)]
        child = start([*command, *shlex.split(config.serve_args)], output=log)
        try:
            yield _wait(child, ready, log, config.start_timeout)
        finally:
            stop(child)


def _wait(child: subprocess.Popen[bytes], ready: Path, log: IO[bytes], timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while not ready.exists():
        status = child.poll()
        if status is not None:
            raise KINDS.get(status, WorkerError)(
                f"mtk serve ended with exit code {status}:\n{_tail(log)}"
            )
        if time.monotonic() > deadline:
            raise WorkerError(
                f"mtk serve did not answer after {timeout:g} s (--start-timeout):\n{_tail(log)}"
            )
        time.sleep(0.05)
    return ready.read_text(encoding="utf-8").strip()


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace").strip()[-2000:]
