"""Every error a user can meet, one class a kind, each with its documented exit code.

A message says what was found, where (file, line, byte), and which knob to turn.
Errors of the programmer stay plain ``ValueError``/``TypeError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

EXIT_CODES = {
    0: "done",
    2: "wrong usage or configuration",
    3: "bad data",
    4: "checkpoint or artifact problem",
    5: "a quality or parity gate refused",
    6: "a rank or child process failed",
    130: "interrupted",
}


class MtkError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    exit_code: ClassVar[int] = 2
    kind: ClassVar[str] = "error"


@dataclass(frozen=True)
class Problem:
    """One violated rule of a configuration.

    key: dotted name of the option; found: what it was; rule: what must hold;
    fix: the nearest value or the knob that would satisfy the rule.
    """

    key: str
    found: object
    rule: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f" {self.fix}" if self.fix else ""
        return f"{self.key} = {self.found!r}: {self.rule}.{fix}"


class ConfigError(MtkError):
    """The options contradict each other or a rule; holds all violations at once."""

    kind = "config"

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems: tuple[Problem, ...] = ()
        if isinstance(problems, str):
            super().__init__(problems)
            return
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(str(self.problems[0]))
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems in the configuration:\n{lines}")


class LayoutError(ConfigError):
    """Degrees of parallelism that do not fit the model or the machine."""

    kind = "layout"


class DataError(MtkError):
    """Input that cannot be read or is not what it claims to be."""

    exit_code = 3
    kind = "data"


class ArtifactError(MtkError):
    """An artifact that is missing, incomplete, changed or of the wrong kind."""

    exit_code = 4
    kind = "artifact"


class CheckpointError(ArtifactError):
    """A checkpoint that cannot be read, or does not match the run that asks for it."""

    kind = "checkpoint"


class ConversionError(ArtifactError):
    """A model that has no counterpart in the target format, or a weight left over."""

    kind = "conversion"


class GateError(MtkError):
    """A quality or parity gate refused; nothing was published."""

    exit_code = 5
    kind = "gate"


class WorkerError(MtkError):
    """A rank or child process failed; carries its own message first."""

    exit_code = 6
    kind = "worker"


class ServingError(MtkError):
    """A request or a server setting that cannot be honoured.

    ``status`` is the HTTP status a server answers with, ``param`` the field to blame, ``code``
    a word for programs where the status does not tell enough.
    """

    kind = "serving"

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class Interrupted(MtkError):  # noqa: N818 - a stop on request is not an error of anybody
    """SIGINT or SIGTERM was honoured: work is saved and the same command continues it."""

    exit_code = 130
    kind = "interrupted"
