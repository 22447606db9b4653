"""What all steps of ``mtk curate web`` share: parts that outlive a kill, then one artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, InputRecord, publish_prefix
from mtk.artifacts.hashing import sha256_json
from mtk.artifacts.parts import Parts, remove_parts
from mtk.artifacts.publish import library_versions
from mtk.config import config_digest
from mtk.config.curate_rules import RecordOptions
from mtk.curation.output import compression, join_files, require_compressor
from mtk.curation.pages import Place, Source
from mtk.curation.passes import Writing, part_numbers, run_pass, start_of, total
from mtk.curation.sifting import BAD, DROPPED, KEPT, LISTED, Reporting
from mtk.curation.workers import Plan
from mtk.data.dataset_artifact import refuse_foreign
from mtk.data.sources import expand_inputs
from mtk.data.workers import choose_workers
from mtk.errors import ConfigError, DataError
from mtk.session import Session
from stages.preprocess import refuse_changed, stamps
from stages.skip import up_to_date

REPORTS = (".dropped.jsonl", ".bad_lines.jsonl", ".pairs.jsonl")


@dataclass(frozen=True)
class Step:
    """One step with its configuration (which has input, output, prefix, records).

    read, kept: the passes whose parts hold counts of the input, and the output.
    """

    stage: str
    config: Any
    read: str
    kept: str

    @property
    def records(self) -> RecordOptions:
        found: RecordOptions = self.config.records
        return found

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def reporting(self) -> Reporting:
        records = self.records
        suffix = compression(self.config.output)
        return Reporting(suffix, records.list_dropped, records.on_bad_line == "skip")


@dataclass(frozen=True)
class Desk:
    """What a step works with."""

    step: Step
    parts: Parts
    files: tuple[Path, ...]
    session: Session
    folder: Path  # where further files of the artifact are written

    @property
    def workers(self) -> int:
        sizes = [path.stat().st_size for path in self.files]
        return choose_workers(self.step.records.workers, sizes)

    def run(self, phase: str, source: Source, plan: Plan[Any], writing: Writing[Any]) -> None:
        """One pass over the input."""
        place: Place = start_of(self.parts, phase)
        size = sum(path.stat().st_size for path in self.files) / 1e6
        done = source.behind(place) / 1e6
        name = self.step.stage if phase == self.step.kept else f"{self.step.stage}: {phase}"
        with self.session.reporter.progress(name, size, "MB", done) as progress:
            run_pass(
                self.parts,
                phase,
                source,
                plan,
                writing,
                workers=self.workers,
                part_bytes=int(self.step.records.part_mb * 1_000_000),
                progress=progress,
            )


Work = Callable[[Desk], dict[str, Any]]  # returns further metrics


def input_files(config: Any) -> list[Path]:
    """The files of ``--input`` without what an earlier run of the same command wrote.

    Raises DataError if the output itself is named.
    """
    own = [Path(config.output), *(Path(f"{config.prefix}{end}") for end in REPORTS)]
    places = {path.resolve() for path in own}
    for pattern in config.input:
        if Path(pattern).exists() and Path(pattern).resolve() in places:
            raise DataError(f"{pattern} is the output of this command. Choose another --output.")
    found = expand_inputs(config.input, config.prefix)
    files = [path for path in found if path.resolve() not in places]
    if not files:
        raise DataError(f"--input {' '.join(config.input)} matches nothing but the output.")
    return files


def curate(
    step: Step, files: Sequence[Path], inputs: Sequence[InputRecord], session: Session, work: Work
) -> Artifact:
    """Do the work, or what is left of it, and publish; a complete artifact is not made again.

    Raises DataError (input), ArtifactError (output), ConfigError, WorkerError. Finished parts
    stay after a kill or an interruption, not after an error that repeating would not cure.
    """
    config = step.config
    before = stamps(list(files))
    key = _key(step, inputs)
    done = up_to_date(config.prefix, step.stage, config, inputs, session)
    if done is not None:
        remove_parts(config.prefix)
        return done
    require_compressor(config.output)
    refuse_foreign([step.output], config.prefix, force=session.force)
    publishing = publish_prefix(
        config.prefix,
        kind="corpus",
        stage=step.stage,
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    )
    with Parts(config.prefix, key) as parts:
        try:
            with publishing as publication:
                desk = Desk(step, parts, tuple(files), session, publication.folder)
                more = work(desk)
                refuse_changed(before)
                metrics = _metrics(step, parts)
                _check(metrics, step)
                _join(step, parts, publication.folder)
                publication.metrics |= metrics | more
        except BaseException as error:
            if not len(parts) or isinstance(error, (DataError, ConfigError)):
                parts.remove()
            raise
        parts.remove()
    _report(step, metrics, session)
    return publication.artifact


def _key(step: Step, inputs: Sequence[InputRecord]) -> str:
    content = [(item.role, item.content) for item in inputs]
    return sha256_json([step.stage, config_digest(step.config), content, library_versions()])


def _metrics(step: Step, parts: Parts) -> dict[str, Any]:
    counts = total(parts, step.read, "counts")
    if step.kept != step.read:
        counts.update(total(parts, step.kept, "counts"))
    bad, dropped = total(parts, step.read, "bad"), total(parts, step.kept, "dropped")
    return {
        "records": counts["records"],
        "bad_records": bad.total(),
        "bad_by_reason": dict(sorted(bad.items())),
        "pages": counts["records"] - bad.total(),
        "pages_kept": counts["pages_kept"],
        "pages_dropped": dropped.total(),
        "dropped_by_reason": dict(sorted(dropped.items())),
        "records_written": counts["records_written"],
        "bytes_read": counts["bytes_read"],
        "bytes_written": counts["bytes_written"],
    }


def _check(metrics: dict[str, Any], step: Step) -> None:
    """What preprocess refuses too, and a step that leaves nothing. Raises DataError."""
    records, bad = metrics["records"], metrics["bad_records"]
    reasons = _listed(metrics["bad_by_reason"])
    if not records:
        raise DataError("the input holds no records: every file is empty. Correct --input.")
    if bad == records:
        raise DataError(f"all {records:,} records are bad ({reasons}). Correct the field's name.")
    allowed = step.records.max_bad_fraction
    if allowed is not None and bad > allowed * records:
        raise DataError(
            f"{bad:,} of {records:,} records are bad ({reasons}), more than "
            f"--max-bad-fraction {allowed} allows."
        )
    if not metrics["pages_kept"]:
        raise DataError(
            f"{step.stage} drops all {metrics['pages']:,} pages "
            f"({_listed(metrics['dropped_by_reason'])}). Loosen its options, or leave it out."
        )


def _join(step: Step, parts: Parts, folder: Path) -> None:
    def all_of(phase: str, name: str) -> list[Path]:
        return [parts.part(number) / name for number in part_numbers(parts, phase)]

    prefix = folder / Path(step.config.prefix).name
    join_files(all_of(step.kept, KEPT), folder / step.output.name)
    if step.records.list_dropped:
        join_files(all_of(step.kept, DROPPED), Path(f"{prefix}.dropped.jsonl"))
    bad = Path(f"{prefix}.bad_lines.jsonl")
    join_files(all_of(step.read, BAD), bad, optional=True)
    if bad.exists():
        _shorten(bad)


def _shorten(path: Path) -> None:
    """Parts list up to 10,000 each; the whole lists as many."""
    with path.open("rb+") as stream:
        for _ in range(LISTED):
            if not stream.readline():
                return
        stream.truncate(stream.tell())


def _listed(reasons: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))


def _report(step: Step, metrics: dict[str, Any], session: Session) -> None:
    dropped = _listed(metrics["dropped_by_reason"])
    session.reporter.info(
        f"{step.stage}: {metrics['pages_kept']:,} of {metrics['pages']:,} pages kept"
        + (f"; dropped: {dropped}" if dropped else "")
    )
    if metrics["bad_records"]:
        session.reporter.warn(
            f"{metrics['bad_records']:,} of {metrics['records']:,} records were left out: "
            f"{_listed(metrics['bad_by_reason'])}"
        )
