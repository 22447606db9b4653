"""Writing a checkpoint: one process alone, or every rank its blocks into one folder."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, InputRecord, open_artifact, publish_directory
from mtk.checkpoint.save import CheckpointContent, write_content
from mtk.checkpoint.sharded import join_blocks, write_blocks
from mtk.checkpoint.steps import prune_steps, step_folder
from mtk.convert.adapters import write_base
from mtk.errors import CheckpointError
from mtk.parallel.collectives import gather_objects, share_object
from mtk.training.best import Best
from mtk.training.job import Job
from mtk.training.progress import RunProgress
from mtk.training.state import Identity, blocks, training_record
from mtk.training.step import Stepper

# Python then names no file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Saver:
    """Publishes checkpoints of a run below ``--save`` and prunes old ones.

    Every rank calls :meth:`save` between the same two steps; rank 0 publishes what all have
    written, or nothing. best: names one that is not pruned.
    """

    stepper: Stepper
    progress: RunProgress
    identity: Identity
    job: Job
    inputs: Sequence[InputRecord]
    command: str
    best: Best | None = None

    def save(self, metrics: dict[str, Any]) -> Artifact:
        """The checkpoint of the current step. Raises CheckpointError when a rank cannot
        write its part."""
        final = step_folder(self.job.save, self.progress.step)
        if self.stepper.ranks.world.first:
            try:
                self._publish(final, metrics)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise CheckpointError(f"{final} cannot be written: {error.strerror}.") from error
        else:
            self._write_part(Path(share_object(None, self.stepper.ranks.world, "save.folder")))
        share_object(None, self.stepper.ranks.world, "save.published")
        return open_artifact(final, "checkpoint")

    def _publish(self, final: Path, metrics: dict[str, Any]) -> None:
        with publish_directory(
            final,
            kind="checkpoint",
            stage=self.job.stage,
            config=self.job.recorded,
            inputs=self.inputs,
            command=self.command,
            force=True,
        ) as publication:
            write_content(publication.folder, self._content(), self.job.recorded, self._limit)
            self.job.data.save_tokenizer(publication.folder / "tokenizer")
            if self.stepper.placed.frozen and self.job.base is not None:
                base, digest = self.job.base.source.folder, self.identity.base or ""
                write_base(publication.folder, final, base, digest)
            if self.stepper.ranks.distributed:
                path = str(publication.folder.resolve())
                share_object(path, self.stepper.ranks.world, "save.folder")
                self._write_part(publication.folder)
                self._join(publication.folder)
            counts = {"step": self.progress.step, "tokens": self.progress.consumed_tokens}
            publication.metrics.update(counts | metrics)
        keep, best = self.job.config.checkpoint.keep_checkpoints, self.best
        prune_steps(self.job.save, keep, None if best is None else best.step)

    @property
    def _limit(self) -> int:
        return self.job.config.checkpoint.max_shard_size

    def _content(self) -> CheckpointContent:
        """What rank 0 writes alone: with several ranks all but the tensors."""
        record = training_record(self.stepper, self.progress, self.identity)
        tensors: dict[str, dict[str, Any]] = {}
        if not self.stepper.ranks.distributed:
            for index, own in blocks(self.stepper).items():
                tensors[index] = {name: block.tensor for name, block in own.items()}
        return CheckpointContent(
            model_config=self.job.config.model,
            weights=tensors.get("model", {}),
            optimizer=tensors.get("optimizer", {}),
            random=tensors.get("random", {}),
            training=record,
        )

    def _write_part(self, folder: Path) -> None:
        ranks, failure = self.stepper.ranks, ""
        try:
            for index, own in blocks(self.stepper).items():
                write_blocks(folder, index, own, ranks.rank, self._limit)
        except (OSError, CheckpointError) as error:
            failure = f"rank {ranks.rank} cannot write its part to {folder}: {error}".rstrip(".")
        failures = [f for f in gather_objects(failure, ranks.world, "save.written") if f]
        if failures:
            raise CheckpointError(
                f"{'; '.join(failures)}. All ranks must see the folder of --save on a shared disk."
            )

    def _join(self, folder: Path) -> None:
        everyone = range(self.stepper.ranks.world.size)
        join_blocks(folder, "model", everyone)
        join_blocks(folder, "optimizer", everyone)
        join_blocks(folder, "random", everyone)
