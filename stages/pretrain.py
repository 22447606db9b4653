"""Stage pretrain: datasets -> checkpoints, on one process or many ranks."""

from __future__ import annotations

from mtk.artifacts import Artifact
from mtk.config.pretrain import PretrainConfig
from mtk.data.stop import terminate_cleanly
from mtk.errors import LayoutError, Problem
from mtk.launch.local import launch
from mtk.launch.process import Place, find_place
from mtk.parallel.apply import training_device
from mtk.parallel.compat import fitting_warnings
from mtk.session import Session
from mtk.training.custom import NOTHING_OWN, Custom
from mtk.training.join import training_ranks
from mtk.training.run import run_rank


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
    session = session or Session()
    device = training_device(config.runtime).type
    place = find_place(device)
    if place.started_by != "alone" or config.parallel.nproc == 1:
        return train_here(place, config, session, custom)
    custom.check_importable()
    artifact: Artifact = launch(
        train_here,
        (config, session.of_rank(0), custom),
        config.parallel.nproc,
        device=device,
        timeout=config.parallel.timeout_seconds,
    )
    return artifact


@terminate_cleanly()
def train_here(
    place: Place, config: PretrainConfig, session: Session, custom: Custom = NOTHING_OWN
) -> Artifact:
    """The part of the rank that this process is."""
    if place.world != config.world:
        rule = f"the layout is for {config.world} ranks, and {place.world} were started"
        raise LayoutError([Problem("parallel.nproc", config.parallel.nproc, rule)])
    with fitting_warnings(first=place.rank == 0), training_ranks(place, config) as ranks:
        return run_rank(config, session, ranks, custom)
