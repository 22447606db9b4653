"""Stage pretrain: datasets -> checkpoints."""

from __future__ import annotations

import torch

from mtk.artifacts import Artifact
from mtk.config.pretrain import PretrainConfig, RuntimeConfig
from mtk.data.stop import terminate_cleanly
from mtk.parallel.apply import training_device
from mtk.parallel.deterministic import set_deterministic
from mtk.parallel.ranks import Ranks
from mtk.session import Session
from mtk.training.run import run_rank


@terminate_cleanly()
def run(config: PretrainConfig, session: Session | None = None) -> Artifact:
    """Train until the length is reached; returns the last checkpoint.

    The same call continues an interrupted run bit for bit, and returns at once when the
    run is complete. Raises MtkError subclasses: ConfigError, DataError, CheckpointError,
    GateError (loss not finite), Interrupted (signal; state saved).
    """
    prepare_torch(config.runtime)
    ranks = Ranks(device=training_device(config.runtime))
    return run_rank(config, session or Session(), ranks)


def prepare_torch(runtime: RuntimeConfig) -> None:
    """Threads and determinism of this process."""
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    set_deterministic(runtime)
