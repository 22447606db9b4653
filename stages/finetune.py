"""Stage finetune: a pretrained model and new data -> checkpoints, on one process or many ranks."""

from __future__ import annotations

from mtk.artifacts import Artifact
from mtk.config.finetune import FinetuneConfig
from mtk.config.pretrain import PretrainConfig
from mtk.data.stop import terminate_cleanly
from mtk.launch.process import Place
from mtk.session import Session
from mtk.training.finetune import finetune_job, finetuned_model
from mtk.training.pretrained import open_pretrained
from mtk.training.run import run_job
from stages.on_ranks import joined, train_on_ranks


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
    return train_on_ranks(train_here, core, session, config)


@terminate_cleanly()
def train_here(
    place: Place, core: PretrainConfig, session: Session, config: FinetuneConfig
) -> Artifact:
    """The part of the rank that this process is."""
    with joined(place, core) as ranks:
        reporter = (session if ranks.world.first else session.of_rank(ranks.rank)).reporter
        base = open_pretrained(config.pretrained_checkpoint)
        return run_job(finetune_job(config, base, reporter), session, ranks)
