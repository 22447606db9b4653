"""The rule by which a stage does not run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtk.artifacts import Artifact, InputRecord, completed
from mtk.session import Session


def up_to_date(
    path: str, stage: str, config: Any, inputs: Sequence[InputRecord], session: Session
) -> Artifact | None:
    """The complete artifact at ``path`` if it was made from this configuration and these
    inputs, saying so; None when the stage has to run, as it always does with --force."""
    if session.force:
        return None
    done = completed(path, stage=stage, config=config, inputs=inputs)
    if done is not None:
        session.reporter.info(f"{stage}: {path} is complete, skipped")
    return done
