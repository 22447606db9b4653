"""What a stage needs besides its configuration: a reporter, the command, the force flag."""

from __future__ import annotations

from dataclasses import dataclass, field

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
