"""``mtk curate web``: all steps from a crawl to a clean corpus, one after another."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, InputRecord, publish_prefix
from mtk.config.curate_web import CurateWebConfig
from mtk.curation.output import require_compressor
from mtk.data.dataset_artifact import refuse_foreign
from mtk.data.stop import terminate_cleanly
from mtk.errors import ArtifactError
from mtk.session import Session
from stages.curate_web import (
    evaluation_inputs,
    list_inputs,
    run_clean,
    run_decontaminate,
    run_duplicates,
    run_urls,
    tokenizer_inputs,
)
from stages.curation_step import REPORTS, input_files
from stages.preprocess import corpus_inputs
from stages.skip import up_to_date

STAGE = "curate web"
RUN: dict[str, Callable[[Any, Session], Artifact]] = {
    "urls": run_urls,
    "clean": run_clean,
    "duplicates": run_duplicates,
    "decontaminate": run_decontaminate,
}


def run(config: CurateWebConfig, session: Session | None = None) -> Artifact:
    """Every step as an artifact of its own in ``P.steps/``, then the last one's corpus as ``P``.

    Steps that are complete are not run again, so the same command continues. Raises what the
    steps raise.
    """
    session = session or Session()
    steps = Path(f"{config.prefix}.steps")
    with terminate_cleanly():
        inputs = _inputs(config)
        done = up_to_date(config.prefix, STAGE, config, inputs, session)
        if done is not None:
            _clear(steps, config)
            return done
        require_compressor(config.output)
        refuse_foreign([Path(config.output)], config.prefix, force=session.force)
        publishing = publish_prefix(
            config.prefix,
            kind="corpus",
            stage=STAGE,
            config=config,
            inputs=inputs,
            command=session.command,
            force=session.force,
        )
        with publishing as publication:
            made = _run_steps(config, steps, session)
            for number, (name, artifact) in enumerate(made.items(), start=1):
                last = number == len(made)
                _take(artifact, name, last, config, publication.folder)
            publication.metrics |= _metrics(made)
        _clear(steps, config)
    return publication.artifact


def _inputs(config: CurateWebConfig) -> list[InputRecord]:
    """All that any step reads."""
    inputs = corpus_inputs(input_files(config))
    if "urls" in config.steps:
        inputs += list_inputs(config.urls)
    if "clean" in config.steps:
        inputs += tokenizer_inputs(config.clean)
    if "decontaminate" in config.steps:
        inputs += evaluation_inputs(config.decontamination)
    return inputs


def _run_steps(config: CurateWebConfig, folder: Path, session: Session) -> dict[str, Artifact]:
    made: dict[str, Artifact] = {}
    source = config.input
    for number, name in enumerate(config.steps, start=1):
        session.reporter.info(f"{STAGE}: step {number} of {len(config.steps)}: {name}")
        last = number == len(config.steps)
        suffix = config.output.removeprefix(config.prefix) if last else ".jsonl"
        output = f"{folder / _step_name(number, name)}{suffix}"
        step = config.step(name, source, output)
        try:
            made[name] = RUN[name](step, Session(session.reporter))
        except ArtifactError:
            # What an earlier run left there, made with other options, is of no use.
            made[name] = RUN[name](step, Session(session.reporter, force=True))
        source = (output,)
    return made


def _step_name(number: int, name: str) -> str:
    return f"{number}_{name}"


def _take(artifact: Artifact, name: str, last: bool, config: CurateWebConfig, folder: Path) -> None:
    """What of a step belongs to the result: its reports, and the corpus of the last."""
    prefix = Path(config.prefix).name
    for entry in artifact.files:
        end = entry.path.removeprefix(artifact.path.name)
        if not end.startswith(REPORTS):
            if last:
                _copy(artifact.folder / entry.path, folder / f"{prefix}{end}", config.keep_steps)
        else:
            _copy(artifact.folder / entry.path, folder / f"{prefix}.{name}{end}", config.keep_steps)


def _copy(source: Path, target: Path, keep: bool) -> None:
    """A second name for a file that goes soon is as good as a copy, and takes no room."""
    if not keep:
        with contextlib.suppress(OSError):
            target.hardlink_to(source)
            return
    shutil.copyfile(source, target)


def _metrics(made: dict[str, Artifact]) -> dict[str, Any]:
    first, last = next(iter(made.values())).metrics, list(made.values())[-1].metrics
    dropped = {
        f"{name}: {reason}": number
        for name, artifact in made.items()
        for reason, number in artifact.metrics["dropped_by_reason"].items()
    }
    return {
        "records": first["records"],
        "pages": first["pages"],
        "pages_kept": last["pages_kept"],
        "records_written": last["records_written"],
        "bytes_read": first["bytes_read"],
        "bytes_written": last["bytes_written"],
        "dropped_by_reason": dropped,
        "steps": {name: dict(artifact.metrics) for name, artifact in made.items()},
    }


def _clear(folder: Path, config: CurateWebConfig) -> None:
    """Remove what the steps wrote, and nothing else that may lie there."""
    if config.keep_steps or not folder.is_dir():
        return
    for number, name in enumerate(config.steps, start=1):
        own = _step_name(number, name)
        for path in [*folder.glob(f"{own}.*"), *folder.glob(f".{own}.*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
