"""``mtk evaluation diff``: two evaluations line by line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

_RUN = typer.Argument(help="Folder of mtk evaluate, or samples_*.jsonl of lm-evaluation-harness.")
_TOLERANCE = typer.Option(
    "--tolerance", help="Largest difference of a log-likelihood, in nats (exit code 5 beyond)."
)
_TOP = typer.Option("--top", help="How many of the largest differences are listed.")
_JSON = typer.Option("--json", help="Machine-readable JSON lines on stdout, people on stderr.")


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the command to the group ``evaluation``."""
    del app
    help = "Compare two evaluations line by line: log-likelihoods, answers, missing documents."
    parents["evaluation"].command("diff", help=help)(_diff)


def _diff(
    first: Annotated[str, _RUN],
    second: Annotated[str, _RUN],
    tolerance: Annotated[float, _TOLERANCE] = 1e-3,
    top: Annotated[int, _TOP] = 5,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    from mtk.errors import ConfigError, GateError, Problem
    from mtk.evaluation.comparison import compare, read_run
    from mtk.log import Reporter

    # Written so that NaN violates too.
    given = {"tolerance": tolerance, "top": top}
    wrong = [
        Problem(name, value, "must be 0 or more") for name, value in given.items() if not value >= 0
    ]
    if wrong:
        raise ConfigError(wrong)
    found = compare(read_run(first), read_run(second))
    equal = found.equal(tolerance)
    lines = "\n".join(found.lines(top))
    Reporter(json_lines=json_).result(lines, equal=equal, tolerance=tolerance, **found.fields())
    if not equal:
        raise GateError(
            f"the evaluations differ: {found.documents} documents in both, "
            f"{len(found.only_a) + len(found.only_b)} in one only, {found.flipped} other answers, "
            f"log-likelihoods apart by up to {found.largest:.3e} (allowed {tolerance:.3e})."
        )
