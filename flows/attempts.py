"""Running one step: its outcome, what a retry can cure, and stopping on request."""

from __future__ import annotations

import errno
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.pipeline import Pipeline, PlannedStep
from flows.serve_check import check_server
from mtk.artifacts import Artifact
from mtk.errors import Interrupted, MtkError, WorkerError
from mtk.session import Session

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in ("EAGAIN", "EINTR", "EIO", "EBUSY", "ESTALE", "ETIMEDOUT", "ECONNRESET", "ENOMEM")
)


@dataclass(frozen=True)
class Outcome:
    """What a step left behind. skipped: it was complete before and nothing was done."""

    name: str
    path: str
    kind: str
    digest: str
    seconds: float
    skipped: bool
    metrics: dict[str, Any] = field(default_factory=dict)
    command: str = ""


def curable(error: BaseException) -> bool:
    """Whether running the step again may succeed: a lost process or a moody file system.

    A wrong option, bad data or a refusing gate stays what it is.
    """
    if isinstance(error, MtkError):
        return isinstance(error, WorkerError)
    return isinstance(error, (ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and error.errno in TRANSIENT
    )


def run_step(step: PlannedStep, pipeline: Pipeline, session: Session) -> Outcome:
    """One attempt. Raises what the stage raises; Interrupted for SIGTERM and SIGINT."""
    with interruptible():
        try:
            if step.name == "serve":
                return _serve(step, pipeline, session)
            return _run_stage(step, pipeline, session)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted in step {step.name}; the same command continues") from (
                None
            )


def run_with_retries(
    attempt: Callable[[], Outcome], retries: int, delay: float, session: Session
) -> Outcome:
    """The policy that the Prefect tasks have, without Prefect."""
    for left in range(retries, 0, -1):
        try:
            return attempt()
        except Exception as error:
            if not curable(error):
                raise
            session.reporter.warn(f"{error} - trying again in {delay:g} s, {left} attempts left")
            time.sleep(delay)
    return attempt()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM raises Interrupted here (in the main thread; stages may handle it better)."""

    def handler(number: int, frame: object) -> None:
        del frame
        name = signal.Signals(number).name
        raise Interrupted(f"stopped by {name}; the same command continues")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_stage(step: PlannedStep, pipeline: Pipeline, session: Session) -> Outcome:
    pipeline.work.mkdir(parents=True, exist_ok=True)
    before = _file_clock(pipeline.work)
    started = time.monotonic()
    artifact = step.stage.run(step.config, session)
    seconds = time.monotonic() - started
    if artifact is None:
        raise TypeError(f"stage {step.stage.name} returned no artifact")
    skipped = artifact.marker.stat().st_mtime_ns < before
    return _outcome(step.name, artifact, seconds, skipped)


def _outcome(name: str, artifact: Artifact, seconds: float, skipped: bool) -> Outcome:
    return Outcome(
        name=name,
        path=str(artifact.path),
        kind=artifact.kind,
        digest=artifact.digest,
        seconds=seconds,
        skipped=skipped,
        metrics=dict(artifact.metrics),
        command=artifact.command,
    )


def _serve(step: PlannedStep, pipeline: Pipeline, session: Session) -> Outcome:
    started = time.monotonic()
    check = check_server(step.config, pipeline.check, session.reporter)
    return Outcome(
        name=step.name,
        path=check.model,
        kind="served model",
        digest=check.digest,
        seconds=time.monotonic() - started,
        skipped=False,
        metrics={"ready_seconds": round(check.ready_seconds, 1), "answer": check.answer},
        command=check.command,
    )


def _file_clock(folder: Path) -> int:
    """Now, as the file system stamps it; its clock is coarser than the system's."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return Path(file.name).stat().st_mtime_ns
