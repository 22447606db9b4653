"""Stage pretrain: datasets -> checkpoints, on one process or many ranks."""

from __future__ import annotations

from mtk.artifacts import Artifact
from mtk.config.pretrain import PretrainConfig
from mtk.data.stop import terminate_cleanly
from mtk.launch.process import Place
from mtk.session import Session
from mtk.training.custom import NOTHING_OWN, Custom
from mtk.training.run import run_rank
from stages.on_ranks import joined, train_on_ranks


@terminate_cleanly()
def run(
    config: PretrainConfig, session: Session | None = None, *, custom: Custom = NOTHING_OWN
) -> Artifact:
    """Train until the length is reached; returns the last checkpoint.

    Starts ``--nproc`` local ranks, unless torchrun or Slurm has started this process as one
    of its ranks. The same call continues an interrupted run bit for bit, and returns at once
    when the run is complete. Raises MtkError subclasses: ConfigError, DataError,
    CheckpointError, GateError (loss not finite), WorkerError (a rank failed), Interrupted
    (signal; state saved). custom: a loss, forward step or batches of one's own; with more than
    one rank they must be importable (TypeError).
    """
    return train_on_ranks(train_here, config, session or Session(), custom)


@terminate_cleanly()
def train_here(place: Place, config: PretrainConfig, session: Session, custom: Custom) -> Artifact:
    """The part of the rank that this process is."""
    with joined(place, config) as ranks:
        return run_rank(config, session, ranks, custom)
