"""A local Prefect server that lives exactly as long as the flow that needs it.

Prefect would start one itself, but that one survives a ``kill -9`` of its parent.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flows.guard import start_guarded, stop
from flows.settings import is_fresh, prefect_environment
from mtk.errors import WorkerError
from mtk.log import Reporter

# Servers of this machine are asked directly: a proxy of the environment cannot reach them.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def prefect_server(reporter: Reporter, home: str | None = None) -> Iterator[str]:
    """Yields the URL of the API: the user's PREFECT_API_URL, or that of a server of our own.

    Must be entered before prefect is imported. Raises WorkerError if it does not start.
    """
    folder = prefect_environment(home=home)
    given = os.environ.get("PREFECT_API_URL")
    if given:
        reporter.info(f"Prefect: using the server at {given}.")
        yield given
        return
    timeout = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
    port = free_port()
    expected = "about 20 s, its first start here" if is_fresh(folder) else "some seconds"
    reporter.info(f"Prefect: starting a local server, state in {folder} ({expected}) ...")
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "CRITICAL"]
    # The server must not see its own address as that of a server to use.
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = start_guarded(command, environment=environment, output=log)
        try:
            while not answers(f"{url}/health"):
                if child.poll() is not None or time.monotonic() - started > timeout:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-2000:]
                    raise WorkerError(
                        f"the local Prefect server did not become ready within {timeout:.0f} s. "
                        f"mtk doctor checks its packages; --no-prefect runs the same stages "
                        f"without it. Its last words:\n{tail}"
                    )
                time.sleep(0.2)
            seconds = time.monotonic() - started
            reporter.info(f"Prefect: ready after {seconds:.0f} s, {url.removesuffix('/api')}")
            os.environ["PREFECT_API_URL"] = url
            yield url
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            stop(child)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str, timeout: float = 5.0, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a GET is answered with 200."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    try:
        with DIRECT.open(request, timeout=timeout) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
