"""Markdown about a run: one note a step, and ``report.md`` at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.attempts import Outcome
from flows.pipeline import Pipeline


def step_markdown(outcome: Outcome) -> str:
    """Path, digest, metrics, seconds, skipped or not."""
    lines = [
        f"### {outcome.name}: {'skipped, complete before' if outcome.skipped else 'done'}",
        "",
        f"- path: `{outcome.path}`",
        f"- kind: {outcome.kind}",
        f"- digest: `sha256:{outcome.digest}`",
        f"- seconds: {outcome.seconds:.1f}",
    ]
    if outcome.command:
        lines += [f"- command: `{outcome.command}`"]
    if outcome.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in flat(outcome.metrics)]
    return "\n".join(lines) + "\n"


def report_markdown(
    pipeline: Pipeline,
    outcomes: Sequence[Outcome],
    seconds: float,
    failure: BaseException | None = None,
) -> str:
    """The whole run: a table, what failed, the loss plot, every step."""
    ran = sum(not outcome.skipped for outcome in outcomes)
    lines = [
        f"# {'Failed' if failure else 'Finished'}: {pipeline.file}",
        "",
        f"{len(outcomes)} of {len(pipeline.steps)} steps complete, {ran} ran now, "
        f"{len(outcomes) - ran} skipped; {seconds:.1f} s.",
        "",
    ]
    if failure is not None:
        kind = getattr(failure, "kind", type(failure).__name__)
        lines += ["```", f"{kind}: {failure}", "```", ""]
    lines += ["| step | state | seconds | digest | path |", "|---|---|---|---|---|"]
    done = {outcome.name: outcome for outcome in outcomes}
    lines += [_row(step.name, done.get(step.name)) for step in pipeline.steps]
    lines.append("")
    for picture in loss_plots(pipeline):
        relative = os.path.relpath(picture, pipeline.work)
        lines += [f"![{picture.stem}]({Path(relative).as_posix()})", ""]
    lines += [step_markdown(outcome) for outcome in outcomes]
    if "serve" in done:
        lines += ["The chain from the served model to the corpus:", "", "```"]
        lines += [f"mtk lineage {done['serve'].path}", "```", ""]
    return "\n".join(lines)


def write_report(pipeline: Pipeline, text: str) -> Path:
    """``report.md`` in the flow's work folder, replaced as a whole."""
    path = pipeline.work / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".report.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def loss_plots(pipeline: Pipeline) -> list[Path]:
    """The PNG files that pretraining has drawn, the loss first."""
    for step in pipeline.steps:
        if step.name == "pretrain":
            save = getattr(getattr(step.config, "checkpoint", None), "save", None)
            found = sorted(Path(save).rglob("*.png")) if save else []
            return sorted(found, key=lambda path: "loss" not in path.stem)
    return []


def flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested metrics as (dotted name, text for a table cell)."""
    rows: list[tuple[str, str]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            rows.append((f"{prefix}{name}", text.replace("|", "\\|").replace("\n", " ")[:300]))
    return rows


def _row(name: str, outcome: Outcome | None) -> str:
    if outcome is None:
        return f"| {name} | not complete | | | |"
    state = "skipped" if outcome.skipped else "done"
    return (
        f"| {name} | {state} | {outcome.seconds:.1f} | `{outcome.digest[:16]}` | `{outcome.path}` |"
    )
