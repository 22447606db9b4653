"""Prefect's environment. Prefect reads it while it is imported, so this comes first.

What the user has set wins. No telemetry; state in one SQLite file below PREFECT_HOME.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

DEFAULTS: Mapping[str, str] = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # A fresh home is migrated for about 20 s; Prefect gives up after exactly that.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # mtk reports errors itself, once; Prefect keeps its log lines with the run.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}


def prefect_environment(
    environment: MutableMapping[str, str] | None = None, home: str | None = None
) -> Path:
    """Fill in what the user left open; returns the folder that holds Prefect's state.

    home: --prefect-home. Default: PREFECT_HOME if set, else ``.mtk/prefect`` in the
    user's home, or in the current folder where the home cannot be written.
    """
    environment = os.environ if environment is None else environment
    for name, value in DEFAULTS.items():
        environment.setdefault(name, value)
    keep_loopback_direct(environment)
    if home is not None:
        environment["PREFECT_HOME"] = str(Path(home).expanduser().resolve())
    elif not environment.get("PREFECT_HOME"):
        environment["PREFECT_HOME"] = str(_default_home())
    folder = Path(environment["PREFECT_HOME"]).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep_loopback_direct(environment: MutableMapping[str, str]) -> None:
    """Where a proxy is set, except this machine from it: no proxy reaches a server here."""
    if not any(name.lower().endswith("_proxy") for name in environment):
        return
    # Readers differ in which spelling they look at first.
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in ("127.0.0.1", "localhost", "::1") if host not in hosts]
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(hosts)


def is_fresh(home: Path) -> bool:
    """Whether Prefect has still to create its database there."""
    return not (home / "prefect.db").exists()


def _default_home() -> Path:
    try:
        folder = Path.home() / ".mtk" / "prefect"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path.cwd() / ".mtk" / "prefect"
