"""A whole training run as one rank sees it: find the start, train, publish checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtk.artifacts import Artifact, InputRecord, open_artifact, verify
from mtk.config.layout_rules import stacked_layers
from mtk.config.pretrain import PretrainConfig
from mtk.errors import CheckpointError
from mtk.log import Reporter
from mtk.parallel.collectives import share_object
from mtk.parallel.describe import describe_layout
from mtk.parallel.ranks import Ranks
from mtk.parallel.rng import stream_seed
from mtk.precision.main_weights import COMPUTE_DTYPES
from mtk.session import Session
from mtk.training.assemble import make_stepper
from mtk.training.data import (
    data_identity,
    run_data,
    target_samples,
    with_vocabulary,
)
from mtk.training.loop import Loop, RunData
from mtk.training.metrics import Log, MetricsLog, NoLog, check_tensorboard
from mtk.training.opened_data import OpenedData, open_data
from mtk.training.plots import write_plots
from mtk.training.progress import RunProgress
from mtk.training.resume import Start, exclusive, find_start, start_again, start_over
from mtk.training.saving import Saver
from mtk.training.state import Identity, restore, restore_weights
from mtk.training.step import Stepper
from mtk.training.stop import stop_on_signals


@dataclass(frozen=True)
class Run:
    """What :func:`train` needs. save: the folder of checkpoints."""

    config: PretrainConfig
    session: Session
    stepper: Stepper
    data: OpenedData
    batches: RunData
    identity: Identity
    save: Path
    start: Start


def run_rank(config: PretrainConfig, session: Session, ranks: Ranks) -> Artifact:
    """Train until the length is reached; every rank returns the last checkpoint.

    Rank 0 alone reads what is in the folder of checkpoints, reports and publishes. Raises
    MtkError subclasses: ConfigError, DataError, CheckpointError, GateError (loss not
    finite), Interrupted (signal; state saved).
    """
    world = ranks.world
    if not world.first:
        session = session.of_rank(ranks.rank)
    data = open_data(config.data)
    config = with_vocabulary(config, data)
    samples = target_samples(config)
    stepper = make_stepper(config, samples, ranks)
    save = Path(config.checkpoint.save)
    own = Start()
    if world.first:
        own = (start_again if session.force else find_start)(config, save, samples, data)
    start: Start = share_object(own, world, "run.start")
    if start.finished is not None:
        session.reporter.info(f"{start.folder} is already complete; nothing to train.")
        return start.finished
    # Everything that can be wrong with the data is found before anything is written.
    if world.first:
        check_tensorboard(config.logging.tensorboard_dir)
    batches = _batches(config, data, samples, session.reporter, ranks)
    identity = Identity(
        data_identity(config, data, samples),
        data.fingerprint,
        config.runtime.seed,
        config.precision.precision,
    )
    prepared = Run(config, session, stepper, data, batches, identity, save, start)
    _tell_layout(prepared)
    with exclusive(save) if world.first else nullcontext():
        if world.first:
            _still_so(prepared, samples)
        share_object(None, world, "run.locked")
        return train(prepared, begin(prepared))


def _tell_layout(run: Run) -> None:
    config, stepper = run.config, run.stepper
    dtype, layers = COMPUTE_DTYPES[config.precision.precision], stacked_layers(config.model)
    text, fields = describe_layout(stepper.placed, stepper.ranks, config.parallel, dtype, layers)
    run.session.reporter.info(text)
    run.session.reporter.event("layout", **fields)


def _batches(
    config: PretrainConfig, data: OpenedData, samples: int, reporter: Reporter, ranks: Ranks
) -> RunData:
    """Rank 0 first: it builds the index caches that the others then find."""
    if not ranks.world.first:
        share_object(None, ranks.world, "run.data")
    found = run_data(config, data, samples, reporter, ranks.dp.rank, ranks.dp.size)
    if ranks.world.first:
        share_object(None, ranks.world, "run.data")
    return found


def _still_so(run: Run, samples: int) -> None:
    """With the lock held: no other run has written since the start was chosen."""
    if run.session.force:
        start_over(run.save)
    elif find_start(run.config, run.save, samples, run.data) != run.start:
        raise CheckpointError(
            f"another run wrote checkpoints into {run.save} while this one was prepared. Repeat "
            f"the command to continue them, or use another --save."
        )


def begin(run: Run) -> RunProgress:
    """Bring the state to where the run starts."""
    stepper, start, session = run.stepper, run.start, run.session
    seed, sequence_parallel = run.config.runtime.seed, run.config.parallel.sequence_parallel
    torch.manual_seed(stream_seed(seed, stepper.ranks, sequence_parallel))
    if start.folder is None:
        return RunProgress()
    for warning in start.warnings:
        session.reporter.warn(warning)
    # Training on from weights that changed on disk would go unnoticed.
    if stepper.ranks.world.first:
        verify(open_artifact(start.folder, "checkpoint"))
    share_object(None, stepper.ranks.world, "run.verified")
    if start.weights_only:
        restore_weights(stepper, start.folder)
        session.reporter.info(f"weights from {start.folder}; step 0, fresh optimizer")
        return RunProgress()
    progress = restore(stepper, start.folder, run.identity)
    session.reporter.info(f"continuing {start.folder} at step {progress.step}")
    return progress


def train(run: Run, progress: RunProgress) -> Artifact:
    """Run the loop; every checkpoint is an artifact below ``run.save``."""
    config, save, session = run.config, run.save, run.session
    inputs = run.data.inputs() + initial_model(run.start, save)
    saver = Saver(
        save,
        run.stepper,
        progress,
        run.identity,
        config,
        inputs,
        run.data.tokenizer_folder,
        session.command,
    )
    saved: list[Artifact] = []

    def write_checkpoint(metrics: dict[str, Any]) -> None:
        artifact = saver.save(metrics)
        saved.append(artifact)
        session.reporter.event("checkpoint", step=progress.step, path=str(artifact.path))

    first = run.stepper.ranks.world.first
    log = _log(save, progress, config) if first else NoLog()
    loop = Loop(config, run.stepper, run.batches, progress, log, session.reporter, write_checkpoint)
    with stop_on_signals() as stop:
        try:
            loop.run(stop)
        finally:
            log.close()
            if config.logging.plots and first:
                write_plots(save / "metrics.jsonl", save / "plots")
    return saved[-1]


def _log(save: Path, progress: RunProgress, config: PretrainConfig) -> Log:
    return MetricsLog(save / "metrics.jsonl", progress.step, config.logging.tensorboard_dir)


def initial_model(start: Start, save: Path) -> list[InputRecord]:
    """What a run was continued or finetuned from, when that lies outside its own folder."""
    if start.folder is None:
        return []
    artifact = open_artifact(start.folder, "checkpoint")
    if start.folder.parent != save:
        return [artifact.as_input("initial model")]
    return [record for record in artifact.inputs if record.role == "initial model"]
