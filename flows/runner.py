"""A pipeline without Prefect: the same steps, retries, skips and report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flows.attempts import Outcome, interruptible, run_step, run_with_retries
from flows.pipeline import Pipeline, PlannedStep
from flows.report import report_markdown, write_report
from mtk.session import Session

RunStep = Callable[[PlannedStep], Outcome]


@dataclass
class Ledger:
    """What a run has done so far."""

    pipeline: Pipeline
    outcomes: list[Outcome] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def report(self, failure: BaseException | None = None) -> str:
        """The report as it stands, also written to ``report.md``."""
        seconds = time.monotonic() - self.started
        text = report_markdown(self.pipeline, self.outcomes, seconds, failure)
        write_report(self.pipeline, text)
        return text


def run_plain(pipeline: Pipeline, session: Session) -> list[Outcome]:
    """Run all steps in order; raises what a step raises."""

    def step(planned: PlannedStep) -> Outcome:
        return run_with_retries(
            lambda: run_step(planned, pipeline, session),
            pipeline.flow.retries,
            pipeline.flow.retry_delay,
            session,
        )

    ledger = Ledger(pipeline)
    with interruptible():
        try:
            run_all(ledger, step, session)
        except BaseException as error:
            ledger.report(error)
            raise
        ledger.report()
    return ledger.outcomes


def run_all(ledger: Ledger, run: RunStep, session: Session) -> None:
    """Every step through ``run``, announced before and after."""
    steps = ledger.pipeline.steps
    for number, step in enumerate(steps, start=1):
        session.reporter.info(f"[{number}/{len(steps)}] {step.name}")
        session.reporter.event("step_started", step=step.name)
        outcome = run(step)
        ledger.outcomes.append(outcome)
        state = "skipped, complete before" if outcome.skipped else f"{outcome.seconds:.1f} s"
        session.reporter.info(f"[{number}/{len(steps)}] {step.name}: {state}, {outcome.path}")
        session.reporter.event(
            "step_finished",
            step=step.name,
            skipped=outcome.skipped,
            seconds=round(outcome.seconds, 3),
            path=outcome.path,
            digest=outcome.digest,
            metrics=outcome.metrics,
        )
