"""Stage finetune: a pretrained model and new data -> checkpoints, on one process or many ranks."""

from __future__ import annotations

from mtk.artifacts import Artifact
from mtk.config.finetune import FinetuneConfig
from mtk.config.pretrain import PretrainConfig
from mtk.data.stop import terminate_cleanly
from mtk.errors import LayoutError, Problem
from mtk.launch.local import launch
from mtk.launch.process import Place, find_place
from mtk.parallel.apply import training_device
from mtk.parallel.compat import fitting_warnings
from mtk.session import Session
from mtk.training.finetune import finetune_job, finetuned_model
from mtk.training.join import training_ranks
from mtk.training.pretrained import open_pretrained
from mtk.training.run import run_job


@terminate_cleanly()
def run(config: FinetuneConfig, session: Session | None = None) -> Artifact:
    """Train until the length is reached; returns the last checkpoint.

    Launches, continues and stops as ``stages.pretrain.run`` does. Raises MtkError subclasses:
    ConfigError (options that the checkpoint contradicts), DataError, ArtifactError and
    CheckpointError (what to begin from, or to continue), GateError, WorkerError, Interrupted.
    """
    session = session or Session()
    # Wrong options are told before any process starts.
    core = config.core(finetuned_model(config, open_pretrained(config.pretrained_checkpoint)))
    device = training_device(config.runtime).type
    place = find_place(device)
    if place.started_by != "alone" or config.parallel.nproc == 1:
        return train_here(place, config, core, session)
    artifact: Artifact = launch(
        train_here,
        (config, core, session.of_rank(0)),
        config.parallel.nproc,
        device=device,
        timeout=config.parallel.timeout_seconds,
    )
    return artifact


@terminate_cleanly()
def train_here(
    place: Place, config: FinetuneConfig, core: PretrainConfig, session: Session
) -> Artifact:
    """The part of the rank that this process is."""
    if place.world != core.world:
        rule = f"the layout is for {core.world} ranks, and {place.world} were started"
        raise LayoutError([Problem("parallel.nproc", config.parallel.nproc, rule)])
    with fitting_warnings(first=place.rank == 0), training_ranks(place, core) as ranks:
        reporter = (session if ranks.world.first else session.of_rank(ranks.rank)).reporter
        base = open_pretrained(config.pretrained_checkpoint)
        return run_job(finetune_job(config, base, reporter), session, ranks)
