"""Checkpoints made by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, InputRecord, publish_directory
from mtk.checkpoint.save import CheckpointContent, write_content


def save_checkpoint(
    folder: Path,
    content: CheckpointContent,
    *,
    stage: str,
    config: Any,
    inputs: Sequence[InputRecord],
    metrics: Mapping[str, Any],
    command: str = "",
    force: bool = False,
    max_shard_size: int = 2_000_000_000,
) -> Artifact:
    """Publish ``folder``; it appears complete or not at all."""
    with publish_directory(
        folder,
        kind="checkpoint",
        stage=stage,
        config=config,
        inputs=inputs,
        command=command,
        force=force,
    ) as publication:
        write_content(publication.folder, content, config, max_shard_size)
        publication.metrics.update(metrics)
    return publication.artifact
