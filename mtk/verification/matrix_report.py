"""The record of a parity matrix: JSON lines, one a layout, that a later run continues."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from mtk import __version__
from mtk.config.verify import VerifyMatrixConfig
from mtk.errors import ArtifactError
from mtk.verification.compare import Difference, Tolerance
from mtk.verification.matrix_models import MODELS, Case

FORMAT, VERSION = "mtk-layout-matrix", 1
FIGURES = ("loss", "norm", "balance", "gradient", "weight")
# Greatest part of a message that goes into a record.
LONGEST = 2000


@dataclass(frozen=True)
class Record:
    """Errors of one layout, as of :class:`Difference`; ``where``: the parameters with the worst
    gradient and weight. seconds: its share of the job."""

    key: str
    ranks: int
    errors: Mapping[str, float]
    where: Mapping[str, str] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    seconds: float = 0.0

    @classmethod
    def of(cls, case: Case, found: Difference, seconds: float) -> Self:
        (gradient, of_gradient), (weight, of_weight) = found.worst_gradient, found.worst_weight
        values = (found.loss, found.norm, found.balance, of_gradient, of_weight)
        errors = dict(zip(FIGURES, values, strict=True))
        where = {"gradient": gradient, "weight": weight}
        return cls(case.key, case.world, errors, where, tuple(found.failures), round(seconds, 3))

    @classmethod
    def failed(cls, case: Case, message: str) -> Self:
        """It did not get as far as figures."""
        return cls(case.key, case.world, {}, failures=(message[:LONGEST],))

    def with_failure(self, text: str) -> Self:
        return dataclasses.replace(self, failures=(*self.failures, text))

    def fields(self) -> dict[str, Any]:
        return {**vars(self), "failures": list(self.failures), "equal": not self.failures}


@dataclass(frozen=True)
class Outcome:
    """What a run of the matrix found. worst: figure -> (error, layout)."""

    count: int
    failed: Sequence[str]
    worst: Mapping[str, tuple[float, str]]
    seconds: float
    path: str = ""

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {
            "layouts": self.count,
            "equal": self.count - len(self.failed),
            "failed": list(self.failed),
            "worst": {key: {"error": e, "layout": of} for key, (e, of) in self.worst.items()},
            "tolerance": vars(Tolerance()),
            "seconds": round(self.seconds, 1),
            "output": self.path,
        }

    def lines(self) -> list[str]:
        """For people."""
        limits = vars(Tolerance())
        lines = [f"{self.count} layouts, {self.count - len(self.failed)} equal one process"]
        lines += [
            f"worst {key:<8}  {error:.1e}  tolerance {limits[key]:.0e}  in {layout}"
            for key, (error, layout) in self.worst.items()
        ]
        lines += [f"DIFFERENT: {key}" for key in self.failed]
        return [*lines, f"verdict: {'DIFFERENT' if self.failed else 'equal'}"]


class Report:
    """Records of this run and of the earlier ones in the same file; a context manager."""

    def __init__(self, path: Path | None, stream: IO[str] | None, records: dict[str, Record]):
        self.path, self._stream, self.records = path, stream, records

    @classmethod
    def open(cls, config: VerifyMatrixConfig, *, force: bool) -> Self:
        """Continue --output, or begin it. Raises ArtifactError where it is another matrix's."""
        if config.matrix.output is None:
            return cls(None, None, {})
        path, head = Path(config.matrix.output), _head(config)
        records: dict[str, Record] = {}
        fresh = force or not path.is_file() or path.stat().st_size == 0
        if not fresh:
            records = _read(path, head)
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w" if fresh else "a", encoding="utf-8")
        if fresh:
            _write(stream, head)
        return cls(path, stream, records)

    @property
    def equal(self) -> set[str]:
        """Layouts that need not run again."""
        return {key for key, record in self.records.items() if not record.failures}

    def add(self, record: Record) -> None:
        self.records[record.key] = record
        if self._stream is not None:
            _write(self._stream, record.fields())

    def outcome(self, keys: Sequence[str]) -> Outcome:
        """Over these layouts, whichever run checked them."""
        records = [self.records[key] for key in keys]
        worst = {}
        for figure in FIGURES:
            found = [(r.errors[figure], r.key) for r in records if figure in r.errors]
            if found:
                # What is not a number is worse than any number.
                worst[figure] = max(found, key=lambda pair: (pair[0] != pair[0], pair))
        failed = [record.key for record in records if record.failures]
        seconds = sum(record.seconds for record in records)
        return Outcome(len(records), failed, worst, seconds, str(self.path or ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()


def _head(config: VerifyMatrixConfig) -> dict[str, Any]:
    """What must be the same for records to stand beside each other."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "mtk": __version__,
        "torch": str(torch.__version__),
        "seed": config.runtime.seed,
        "models": {name: dict(values) for name, values in MODELS.items()},
    }


def _read(path: Path, head: Mapping[str, Any]) -> dict[str, Record]:
    """Records by layout, the last of each; a line that was cut off by a kill is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    fix = "Use another --output, or --force to begin it anew."
    try:
        found = json.loads(lines[0])
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no record of a layout matrix. {fix}")
    changed = [key for key, value in head.items() if found.get(key) != value]
    if changed:
        raise ArtifactError(f"{path} was made with another {', '.join(changed)}. {fix}")
    if not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines), encoding="utf-8")
    records = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            values = json.loads(line)
            values.pop("equal")
            record = Record(**{**values, "failures": tuple(values["failures"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}, line {number}: {error}. {fix}") from error
        records[record.key] = record
    return records


def _write(stream: IO[str], fields: Mapping[str, Any]) -> None:
    stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
    stream.flush()
