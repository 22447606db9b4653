"""What a stage needs besides its configuration: a reporter, the command, the force flag."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mtk.log import Reporter


@dataclass(frozen=True)
class Session:
    """Passed to every stage's ``run(config, session)``.

    command: the command line that started the stage ("" when called from Python; the
    manifest then names the equivalent command). force: overwrite an existing output.
    """

    reporter: Reporter = field(default_factory=Reporter)
    command: str = ""
    force: bool = False

    def of_rank(self, rank: int) -> Session:
        """For one rank of a job, which may be another process: only rank 0 speaks, and on
        that process's own streams. ``of_rank(0)`` can be pickled."""
        reporter = Reporter(
            json_lines=self.reporter.json_lines and rank == 0,
            quiet=self.reporter.quiet or rank != 0,
        )
        return replace(self, reporter=reporter)
