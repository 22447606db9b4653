"""Corpus -> tokenizer -> preprocess -> pretrain -> evaluate -> convert -> quantize -> serve.

Every step is a Prefect task that runs an ordinary stage; Prefect adds history, retries,
schedules and a page to look at. Import this only after :mod:`flows.settings` has been
applied. The final state tells the truth: Failed if a stage failed, Cancelled if it was
interrupted (SIGTERM, Ctrl-C), Completed otherwise; a step that was complete before ends
in a Completed state that is named Skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogHandler
from prefect.states import Cancelled, Completed

from flows.attempts import Outcome, curable, interruptible, run_step
from flows.chain import Chain
from flows.guard import die_with_parent
from flows.pipeline import Pipeline, PlannedStep, plan_pipeline
from flows.report import step_markdown
from flows.runner import Ledger, run_all
from flows.stale import settle_killed_runs, tag_this_run
from flows.steps import END_TO_END
from mtk.config import Layer
from mtk.errors import Interrupted
from mtk.log import Reporter
from mtk.session import Session


@flow(name="end_to_end", log_prints=False, validate_parameters=False)
def end_to_end(
    config: str,
    folder: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    force: bool = False,
    json_lines: bool = False,
) -> State[Any]:
    """Run the pipeline of a YAML file.

    folder: relative paths of the file start here (a scheduled run starts elsewhere).
    overrides: values by ``section.option``. Raises what a stage raises.
    """
    return run_chain(END_TO_END, config, folder, overrides, force=force, json_lines=json_lines)


def run_chain(
    chain: Chain,
    config: str,
    folder: str | None,
    overrides: Mapping[str, Any] | None,
    *,
    force: bool,
    json_lines: bool,
) -> State[Any]:
    """The body of every flow; see :func:`end_to_end`."""
    parent = None
    if folder is not None:
        parent = os.getppid()  # the process of the schedule
        die_with_parent(parent)
        os.chdir(folder)
    tag_this_run()
    settle_killed_runs()
    session = Session(Reporter(json_lines=json_lines), force=force)
    layer = Layer("--set", overrides) if overrides else None
    return run_tasks(plan_pipeline(config, chain.stages(), chain, layer), session, parent)


def run_in_prefect(
    function: Callable[..., State[Any]],
    config: str,
    overrides: Mapping[str, Any] | None,
    *,
    force: bool,
    json_lines: bool,
) -> None:
    """Run the flow ``function`` here and now. Raises what a stage raised, or Interrupted."""
    try:
        state = function(
            str(Path(config).resolve()), None, overrides, force, json_lines, return_state=True
        )
    finally:
        send_the_rest()
    raise_for_state(state)


def send_the_rest() -> None:
    """Logs and events still queued, while the server is there to take them; left to the
    end of the process they would be retried against a closed port for a minute."""
    APILogHandler().flush()
    EventsWorker.drain_all(timeout=5)


def raise_for_state(state: State[Any]) -> None:
    """The exception behind a state that is not Completed."""
    if state.is_cancelled():
        raise Interrupted(state.message or "interrupted; the same command continues")
    state.result(raise_on_failure=True)


def run_tasks(pipeline: Pipeline, session: Session, parent: int | None = None) -> State[Any]:
    """Inside a flow run: every step as a task; returns the flow's final state.

    parent: the process that this one must not outlive, if there is one.
    """
    ledger = Ledger(pipeline)
    with interruptible():
        try:
            run_all(ledger, lambda step: _run_task(step, pipeline, session, parent), session)
        except Interrupted as error:
            _publish("report", ledger.report(error), "Interrupted")
            return Cancelled(message=str(error))
        except BaseException as error:
            _publish("report", ledger.report(error), "Failed")
            raise
    _publish("report", ledger.report(), "Report of the run")
    skipped = sum(outcome.skipped for outcome in ledger.outcomes)
    message = f"{len(ledger.outcomes)} steps, {skipped} of them skipped"
    return Completed(message=message, data=None)


def _run_task(
    step: PlannedStep, pipeline: Pipeline, session: Session, parent: int | None
) -> Outcome:
    """One task run. Interrupted ends it as Cancelled, which no retry follows."""
    finished: list[Outcome | Interrupted] = []

    def attempt() -> State[Any]:
        try:
            outcome = run_step(step, pipeline, session)
        except Interrupted as error:
            if parent is not None and os.getppid() != parent:
                # Work is saved, and the server went with the schedule: Prefect would try
                # for minutes to reach it.
                session.reporter.info(f"{error}; the schedule is gone")
                os._exit(error.exit_code)
            finished.append(error)
            return Cancelled(message=str(error))
        finished.append(outcome)
        _publish(f"step-{step.name}", step_markdown(outcome), outcome.path)
        if outcome.skipped:
            return Completed(name="Skipped", message="complete before", data=None)
        return Completed(message=f"{outcome.seconds:.1f} s", data=None)

    run = task(
        name=step.name,
        retries=pipeline.flow.retries,
        retry_delay_seconds=pipeline.flow.retry_delay,
        retry_condition_fn=_may_retry,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(attempt)
    state: State[Any] = run(return_state=True)
    if state.is_completed() and isinstance(finished[-1], Outcome):
        return finished[-1]
    if finished and isinstance(finished[-1], Interrupted):
        raise finished[-1]
    state.result(raise_on_failure=True)
    raise RuntimeError(f"step {step.name} ended as {state.name}: {state.message}")


def _may_retry(task: Any, task_run: Any, state: State[Any]) -> bool:
    del task, task_run
    try:
        state.result(raise_on_failure=True)
    except BaseException as error:
        return curable(error)
    return False


def _publish(key: str, markdown: str, description: str) -> None:
    create_markdown_artifact(markdown=markdown, key=key, description=description)
