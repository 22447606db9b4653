"""The last step: start the server as a child, ask it what the README asks, stop it.

The server is the ordinary ``mtk serve`` with an ordinary configuration file, so that
the printed command keeps up exactly what was checked.
"""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.guard import start_guarded, stop
from flows.server import DIRECT, answers
from mtk.artifacts import find_marker, open_artifact
from mtk.config.flow import ServeCheckConfig
from mtk.errors import ConfigError, MtkError, Problem, ServingError, WorkerError
from mtk.log import Reporter

KINDS: Mapping[int, type[MtkError]] = {
    error.exit_code: error for error in MtkError.__subclasses__() if error is not ServingError
}


@dataclass(frozen=True)
class ServeCheck:
    """model: the served folder; digest: of its artifact; answer: text of the README's
    request; command: what keeps the same server up."""

    model: str
    digest: str
    answer: str
    ready_seconds: float
    command: str


def check_server(config: Any, check: ServeCheckConfig, reporter: Reporter) -> ServeCheck:
    """Raises ConfigError if the address cannot be used, ServingError for a wrong answer,
    and what the server died of otherwise."""
    from mtk.checkpoint.steps import checkpoint_folder  # brings torch

    model = checkpoint_folder(config.load) if find_marker(config.load) is None else config.load
    digest = open_artifact(model).digest
    host = config.listen.host
    port = usable_port(host, config.listen.port)
    if port != config.listen.port:
        reporter.warn(f"something else listens on port {config.listen.port}; asking on {port}")
    arguments = ["serve", "--load", config.load, "--host", host, "--port", str(port)]
    arguments += _other_options(config)
    headers = access_headers(config.listen.api_key_file)
    started = time.monotonic()
    with server_process([sys.executable, "-m", "mtk", *arguments]) as (child, log):
        url = f"http://{host}:{port}"
        reporter.info(f"waiting for the server at {url} ...")
        _wait_until_ready(child, log, f"{url}/health", headers, check.ready_timeout)
        ready = time.monotonic() - started
        request = {"prompts": [check.prompt], "tokens_to_generate": check.tokens_to_generate}
        reporter.info(f"$ {curl_line(host, port, request)}")
        answer = put(f"{url}/api", request, headers)
        reporter.info(json.dumps(answer, ensure_ascii=False))
        if check.sample_tokens:
            _show_sample(url, check, headers, reporter)
    command = shlex.join(["mtk", *arguments])
    reporter.info(f"The server was stopped again. This keeps it up:\n  {command}")
    return ServeCheck(str(model), digest, _text(answer), ready, command)


def usable_port(host: str, port: int) -> int:
    """``port``, or a free one where another program has it and might answer instead.

    Raises ConfigError when the host is none of this machine's addresses.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port, 0):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return int(probe.getsockname()[1])
            except OSError as error:
                reason = error.strerror
    fix = "Set serve.listen.host to an address of this machine, e.g. 127.0.0.1."
    raise ConfigError([Problem("serve.listen.host", host, f"cannot be used: {reason}", fix)])


def access_headers(key_file: str | None) -> dict[str, str]:
    """What a request must carry: the first key of the server's key file, if it has one."""
    headers = {"Content-Type": "application/json"}
    if key_file is not None:
        keys = Path(key_file).read_text(encoding="utf-8").split()
        headers |= {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    return headers


def curl_line(host: str, port: int, request: Mapping[str, Any]) -> str:
    """The request as a person types it (a key is left to that person)."""
    host = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::1") else host
    body = json.dumps(request, separators=(",", ":"))
    return (
        f"curl -X PUT {host}:{port}/api -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def put(
    url: str, request: Mapping[str, Any], headers: Mapping[str, str], timeout: float = 60.0
) -> Any:
    """Send the request with the real curl where there is one. Raises ServingError."""
    body = json.dumps(request)
    if curl := shutil.which("curl"):
        # Headers go through standard input: arguments are seen by every user.
        command = [curl, "-sS", "--noproxy", "*", "--max-time", str(timeout)]
        command += ["-w", "\n%{http_code}", "-X", "PUT", url, "-H", "@-", "-d", body]
        lines = "".join(f"{name}: {value}\n" for name, value in headers.items())
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServingError(f"PUT {url} failed: {done.stderr.strip()}", status=502)
        text, _, status = done.stdout.rpartition("\n")
    else:
        text, status = _put_without_curl(url, body, headers, timeout)
    if status != "200":
        raise ServingError(f"PUT {url} was answered with {status}: {text.strip()}", status=502)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServingError(f"PUT {url} answered no JSON: {text[:200]!r}", status=502) from error


def _put_without_curl(
    url: str, body: str, headers: Mapping[str, str], timeout: float
) -> tuple[str, str]:
    call = urllib.request.Request(url, body.encode(), dict(headers), method="PUT")
    try:
        with DIRECT.open(call, timeout=timeout) as response:
            return response.read().decode(), str(response.status)
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace"), str(error.code)
    except OSError as error:
        raise ServingError(f"PUT {url} failed: {error}", status=502) from error


@contextmanager
def server_process(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """The child and the file with what it said; it is stopped on every way out."""
    with tempfile.TemporaryFile() as log:
        child = start_guarded(command, output=log)
        try:
            yield child, log
        finally:
            stop(child)


def _other_options(config: Any) -> list[str]:
    """Options besides those always shown, as far as they differ from their defaults."""
    from mtk.config import leaves

    arguments: list[str] = []
    for leaf in leaves(type(config)):
        value = config
        for name in leaf.path:
            value = getattr(value, name)
        if leaf.name in ("load", "host", "port") or value in (leaf.default, None):
            continue
        flag = f"--{leaf.name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [flag, *(str(item) for item in values)]
    return arguments


def _wait_until_ready(
    child: subprocess.Popen[bytes],
    log: Any,
    url: str,
    headers: Mapping[str, str],
    timeout: float,
) -> None:
    deadline = time.monotonic() + timeout
    while not answers(url, headers=headers):
        status = child.poll()
        if status is not None or time.monotonic() > deadline:
            log.seek(0)
            tail = log.read().decode(errors="replace").strip()[-2000:]
            if status is None:
                raise WorkerError(f"the server was not ready after {timeout:g} s:\n{tail}")
            message = f"the server ended with exit code {status}:\n{tail}"
            error = KINDS.get(status, WorkerError)
            raise error(message)
        time.sleep(0.1)


def _show_sample(
    url: str, check: ServeCheckConfig, headers: Mapping[str, str], reporter: Reporter
) -> None:
    request = {
        "prompts": [check.sample_prompt],
        "tokens_to_generate": check.sample_tokens,
        "top_k": 1,
    }
    answer = put(f"{url}/api", request, headers)
    reporter.info(f"{check.sample_tokens} tokens, greedy: {_text(answer)!r}")


def _text(answer: Any) -> str:
    try:
        return str(answer["text"][0])
    except (KeyError, IndexError, TypeError) as error:
        raise ServingError(f"the answer has no text: {answer}", status=502) from error
