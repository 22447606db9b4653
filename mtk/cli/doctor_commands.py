"""``mtk doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

_JSON = typer.Option("--json", help="Machine-readable JSON lines on stdout, people on stderr.")
_MARKS = {"ok": "ok     ", "missing": "MISSING", "wrong": "WRONG  ", "absent": "-      "}


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the command to ``app``."""
    del parents
    app.command("doctor", help="Check Python, torch and every package; name the fix.")(_doctor)


def _doctor(json_: Annotated[bool, _JSON] = False) -> None:
    from mtk.cli.doctor_checks import all_checks
    from mtk.errors import ArtifactError
    from mtk.log import Reporter

    checks = list(all_checks())
    width = max(len(check.name) for check in checks)
    lines = [
        f"{_MARKS[check.state]} {check.name:<{width}} {check.found}"
        + (f"  -> {check.fix}" if check.fix else "")
        for check in checks
    ]
    bad = [check.name for check in checks if check.bad]
    fields = [vars(check) for check in checks]
    Reporter(json_lines=json_).result("\n".join(lines), checks=fields, bad=bad)
    if bad:
        raise ArtifactError(f"{', '.join(bad)}: not as needed; the fix stands beside each.")
