"""A crawl to token datasets: urls -> clean -> duplicates -> decontaminate -> preprocess.

As :mod:`flows.end_to_end`, whose rules of states, retries and skips hold here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.curate_steps import CURATE_WEB
from flows.end_to_end import run_chain


@flow(name="curate_web", log_prints=False, validate_parameters=False)
def curate_web(
    config: str,
    folder: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    force: bool = False,
    json_lines: bool = False,
) -> State[Any]:
    """Run the pipeline of a YAML file; see :func:`flows.end_to_end.end_to_end`."""
    return run_chain(CURATE_WEB, config, folder, overrides, force=force, json_lines=json_lines)
