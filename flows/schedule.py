"""``mtk flow serve``: a process that starts a flow when its schedule says so."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.catalog import FlowEntry
from flows.pipeline import plan_pipeline
from flows.server import prefect_server
from mtk.config import Layer
from mtk.errors import ConfigError, Interrupted, Problem
from mtk.log import Reporter
from stages.registry import load


def serve_flow(
    entry: FlowEntry,
    config: str,
    overrides: Mapping[str, Any],
    reporter: Reporter,
    *,
    cron: str | None,
    interval: float | None,
    home: str | None = None,
) -> None:
    """Stay and run ``entry`` on its schedule until SIGTERM or Ctrl-C.

    cron: five fields; interval: seconds. The file is checked now, so that a mistake is
    not found at night. Raises ConfigError; Interrupted when it is stopped.
    """
    check_schedule(cron, interval)
    chain = load(entry.chain)
    plan_pipeline(config, chain.stages(), chain, Layer("--set", overrides))
    with prefect_server(reporter, home):
        if cron is not None:
            require_readable(cron)
        flow = load(entry.function)
        parameters = {
            "config": str(Path(config).resolve()),
            "folder": str(Path.cwd()),
            "overrides": dict(overrides) or None,
        }
        when = f"cron {cron!r}" if cron else f"every {interval:g} s"
        reporter.info(f"serving flow {entry.name}, {when}; Ctrl-C or SIGTERM ends it")
        # Prefect ends its runner by SystemExit, and warns about its own way of stopping.
        warnings.filterwarnings("ignore", message="coroutine 'Runner.astop'")
        with contextlib.suppress(KeyboardInterrupt, SystemExit), _runs_ended():
            flow.serve(
                name=f"{entry.name}-schedule",
                cron=cron,
                interval=interval,
                parameters=parameters,
                # A run that takes longer than its interval must not be joined by the next.
                # (A limit kept by the server would still be held by a run that was killed.)
                limit=1,
                print_starting_message=False,
            )
    raise Interrupted("the schedule was stopped")


def check_schedule(cron: str | None, interval: float | None) -> None:
    """Exactly one of the two. Raises ConfigError."""
    if (cron is None) == (interval is None):
        rule = "give exactly one of --cron and --interval"
        raise ConfigError([Problem("cron", cron, rule, 'For example --cron "0 2 * * *".')])
    if interval is not None and not interval > 0:
        raise ConfigError([Problem("interval", interval, "must be greater than 0")])


def require_readable(cron: str) -> None:
    """Prefect reads the schedule, so Prefect judges it. Raises ConfigError."""
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        rule = "is not a cron expression"
        fix = 'Five fields: minute hour day month weekday, e.g. "0 2 * * *".'
        raise ConfigError([Problem("cron", cron, rule, fix)]) from error


@contextlib.contextmanager
def _runs_ended(patience: float = 60.0) -> Iterator[None]:
    """End the runs that are under way as the block ends, while the server can record it.

    Prefect leaves them to the end of the interpreter, which would wait for them. They get
    SIGTERM, save their work and end as Cancelled.
    """
    try:
        yield
    finally:
        running = multiprocessing.active_children()
        for child in running:
            child.terminate()
        deadline = time.monotonic() + patience
        for child in running:
            child.join(max(0.0, deadline - time.monotonic()))
            if child.is_alive():
                child.kill()
