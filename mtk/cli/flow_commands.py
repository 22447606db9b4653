"""``mtk flow run | serve | list``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

_NAME = typer.Argument(help="Name of the flow (mtk flow list).")
_CONFIG = typer.Option("--config", help="YAML file with one section a step.")
_SET = typer.Option("--set", help="One option as section.option=value; wins over the file.")
_HOME = typer.Option("--prefect-home", help="Folder of Prefect's SQLite file.")
_JSON = typer.Option("--json", help="Machine-readable JSON lines on stdout, people on stderr.")
_FORCE = typer.Option("--force", help="Replace outputs made from another configuration.")
_PLAIN = typer.Option("--no-prefect", help="Run the same steps without Prefect.")
_DRY = typer.Option("--dry-run", help="Check the file and list the steps; run nothing.")
_CRON = typer.Option("--cron", help='When to start, e.g. "0 2 * * *".')
_INTERVAL = typer.Option("--interval", help="Or: seconds between starts.")


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the commands to the group ``flow``."""
    del app
    parents["flow"].command("run", help="Run a flow; the same command continues one.")(_run)
    parents["flow"].command("serve", help="Run a flow on a schedule.")(_serve)
    parents["flow"].command("list", help="Name the flows there are.")(_list)


def _run(
    name: Annotated[str, _NAME],
    config: Annotated[str, _CONFIG],
    set_: Annotated[list[str] | None, _SET] = None,
    no_prefect: Annotated[bool, _PLAIN] = False,
    dry_run: Annotated[bool, _DRY] = False,
    prefect_home: Annotated[str | None, _HOME] = None,
    force: Annotated[bool, _FORCE] = False,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    import time

    from flows.catalog import find_flow
    from flows.pipeline import plan_pipeline
    from mtk.config.files import set_layer
    from mtk.log import Reporter
    from mtk.session import Session
    from stages.registry import load

    entry = find_flow(name)
    layer = set_layer(set_ or [])
    chain = load(entry.chain)
    pipeline = plan_pipeline(config, chain.stages(), chain, layer)
    reporter = Reporter(json_lines=json_)
    if dry_run:
        steps = [step.name for step in pipeline.steps]
        reporter.result(" > ".join(steps), steps=steps, work=str(pipeline.work))
        return
    started = time.monotonic()
    if no_prefect:
        from flows.runner import run_plain

        # Without a command the manifests name the stages' own, which repeat them alone.
        run_plain(pipeline, Session(reporter, force=force))
    else:
        _run_with_prefect(entry.function, config, layer.values, prefect_home, reporter, force)
    report = pipeline.work / "report.md"
    seconds = time.monotonic() - started
    reporter.result(
        f"{name}: finished in {seconds:.1f} s, report in {report}",
        report=str(report),
        seconds=round(seconds, 3),
    )


def _run_with_prefect(
    function: str,
    config: str,
    overrides: Mapping[str, Any],
    home: str | None,
    reporter: Any,
    force: bool,
) -> None:
    from flows.server import prefect_server

    with prefect_server(reporter, home):
        # Prefect reads its environment while it is imported.
        from flows.end_to_end import run_in_prefect
        from stages.registry import load

        json_lines = reporter.json_lines
        run_in_prefect(load(function), config, overrides, force=force, json_lines=json_lines)


def _serve(
    name: Annotated[str, _NAME],
    config: Annotated[str, _CONFIG],
    cron: Annotated[str | None, _CRON] = None,
    interval: Annotated[float | None, _INTERVAL] = None,
    set_: Annotated[list[str] | None, _SET] = None,
    prefect_home: Annotated[str | None, _HOME] = None,
) -> None:
    from flows.catalog import find_flow
    from flows.schedule import serve_flow
    from mtk.config.files import set_layer
    from mtk.log import Reporter

    entry = find_flow(name)
    overrides = set_layer(set_ or []).values
    serve_flow(
        entry, config, overrides, Reporter(), cron=cron, interval=interval, home=prefect_home
    )


def _list(json_: Annotated[bool, _JSON] = False) -> None:
    from flows.catalog import FLOWS
    from mtk.log import Reporter

    text = "\n".join(f"{entry.name}: {entry.steps}" for entry in FLOWS.values())
    Reporter(json_lines=json_).result(text, flows={name: vars(f) for name, f in FLOWS.items()})
