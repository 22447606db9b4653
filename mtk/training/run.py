"""A whole training run as one rank sees it: find the start, train, publish checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mtk.artifacts import Artifact, InputRecord, open_artifact, verify
from mtk.config.layout_rules import stacked_layers
from mtk.config.pretrain import PretrainConfig
from mtk.convert.source import digest_of
from mtk.errors import CheckpointError, DataError
from mtk.log import Reporter
from mtk.parallel.collectives import share_object
from mtk.parallel.describe import describe_layout
from mtk.parallel.ranks import Ranks
from mtk.parallel.rng import stream_seed
from mtk.precision.main_weights import COMPUTE_DTYPES
from mtk.session import Session
from mtk.training.assemble import make_stepper
from mtk.training.best import Best
from mtk.training.custom import NOTHING_OWN, Custom
from mtk.training.data import (
    data_identity,
    run_data,
    target_samples,
    with_vocabulary,
)
from mtk.training.job import Job
from mtk.training.loop import Loop, RunData
from mtk.training.metrics import Log, MetricsLog, NoLog, check_tensorboard
from mtk.training.opened_data import open_data
from mtk.training.plots import write_plots
from mtk.training.pretrained import POOLER, initial_values, restore_pretrained
from mtk.training.profile import profiled
from mtk.training.progress import RunProgress
from mtk.training.resume import Start, exclusive, find_start, start_again, start_over
from mtk.training.saving import Saver
from mtk.training.state import Identity, restore, restore_weights
from mtk.training.step import Stepper
from mtk.training.stop import stop_on_signals


@dataclass(frozen=True)
class Run:
    """What :func:`train` needs."""

    job: Job
    session: Session
    stepper: Stepper
    batches: RunData
    identity: Identity
    start: Start


def run_rank(
    config: PretrainConfig, session: Session, ranks: Ranks, custom: Custom = NOTHING_OWN
) -> Artifact:
    """Pretrain until the length is reached; every rank returns the last checkpoint.

    Raises what :func:`run_job` raises.
    """
    data = open_data(config.data)
    config = with_vocabulary(config, data)
    samples = target_samples(config)
    digest = data_identity(config, data, samples)

    def batches(reporter: Reporter, rank: int, size: int) -> RunData:
        if custom.batches is not None:
            found = custom.batches(config, rank, size)
            _check_length(found.train_samples, samples)
        else:
            found = run_data(config, data, samples, reporter, rank, size)
        if custom.objective is not None:
            # The bytes behind labels belong to plain cross-entropy.
            found = replace(found, token_bytes_V=None)
        return found

    digest = custom.data_digest or digest
    job = Job("pretrain", config, config, samples, data, digest, batches, custom=custom)
    return run_job(job, session, ranks)


def _check_length(own: int, samples: int) -> None:
    """The schedule and the end of a run go by the configuration."""
    if own != samples:
        raise DataError(
            f"batches() returned train_samples = {own}, but the configuration asks for {samples} "
            f"samples. Give one length, e.g. train_samples={own}."
        )


def run_job(job: Job, session: Session, ranks: Ranks) -> Artifact:
    """Train until the length is reached; every rank returns the last checkpoint.

    Rank 0 alone reads what is in the folder of checkpoints, reports and publishes. Raises
    MtkError subclasses: ConfigError, DataError, CheckpointError, GateError (loss not
    finite), Interrupted (signal; state saved).
    """
    world, config, base = ranks.world, job.config, job.base
    if not world.first:
        session = session.of_rank(ranks.rank)
    values = None if base is None else initial_values(base, config.model, config.runtime.seed)
    stepper = make_stepper(
        config,
        job.samples,
        ranks,
        values,
        objective=job.custom.objective,
        forward=job.custom.forward,
    )
    own = Start()
    if world.first:
        own = (start_again if session.force else find_start)(job)
    start: Start = share_object(own, world, "run.start")
    if start.finished is not None:
        session.reporter.info(f"{start.folder} is already complete; nothing to train.")
        return start.finished
    # Everything that can be wrong with the data is found before anything is written.
    if world.first:
        check_tensorboard(config.logging.tensorboard_dir)
    batches = _batches(job, session.reporter, ranks)
    records = base.records() if base is not None and world.first else []
    records = share_object(records, world, "run.base")
    identity = Identity(
        job.data_digest,
        job.data.fingerprint,
        config.runtime.seed,
        config.precision.precision,
        digest_of(records) if records else None,
    )
    prepared = Run(job, session, stepper, batches, identity, start)
    _tell_layout(prepared)
    with exclusive(job.save) if world.first else nullcontext():
        if world.first:
            _still_so(prepared)
        share_object(None, world, "run.locked")
        return train(prepared, begin(prepared), records)


def _tell_layout(run: Run) -> None:
    config, stepper = run.job.config, run.stepper
    dtype, layers = COMPUTE_DTYPES[config.precision.precision], stacked_layers(config.model)
    text, fields = describe_layout(stepper.placed, stepper.ranks, config.parallel, dtype, layers)
    attention = stepper.attention
    if attention is not None and stepper.ranks.device.type == "cuda":
        text += f"; attention by {attention}"
        fields["attention"] = attention.backend
        fields["attention_seconds"] = dict(attention.seconds)
    run.session.reporter.info(text)
    run.session.reporter.event("layout", **fields)


def _batches(job: Job, reporter: Reporter, ranks: Ranks) -> RunData:
    """Rank 0 first: it builds the index caches that the others then find."""
    if not ranks.world.first:
        share_object(None, ranks.world, "run.data")
    found = job.batches(reporter, ranks.dp.rank, ranks.dp.size)
    if ranks.world.first:
        share_object(None, ranks.world, "run.data")
    return found


def _still_so(run: Run) -> None:
    """With the lock held: no other run has written since the start was chosen."""
    if run.session.force:
        start_over(run.job.save)
    elif find_start(run.job) != run.start:
        raise CheckpointError(
            f"another run wrote checkpoints into {run.job.save} while this one was prepared. "
            f"Repeat the command to continue them, or use another --save."
        )


def begin(run: Run) -> RunProgress:
    """Bring the state to where the run starts."""
    stepper, start, session, config = run.stepper, run.start, run.session, run.job.config
    seed, sequence_parallel = config.runtime.seed, config.parallel.sequence_parallel
    torch.manual_seed(stream_seed(seed, stepper.ranks, sequence_parallel))
    base = run.job.base
    if base is not None and (start.folder is None or stepper.placed.frozen):
        anew = restore_pretrained(stepper, base)
        fresh = "; fresh optimizer" if start.folder is None else ""
        session.reporter.info(f"weights from {base.path}{fresh}")
        if start.folder is None and any(name.startswith(POOLER) for name in anew):
            session.reporter.warn(f"{base.path} has no pooler: it begins anew")
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


def train(run: Run, progress: RunProgress, base: list[InputRecord]) -> Artifact:
    """Run the loop; every checkpoint is an artifact below ``--save``.

    base: records of the weights that finetuning began from.
    """
    job, session, save = run.job, run.session, run.job.save
    inputs = job.data.inputs() + (base or initial_model(run.start, save))
    first = run.stepper.ranks.world.first
    best = None if job.figure is None else Best(save, job.figure, progress.step)
    saver = Saver(run.stepper, progress, run.identity, job, inputs, session.command, best)
    saved: list[Artifact] = []
    attention = run.stepper.attention
    # What was measured is not in the configuration.
    kernel = {"attention": attention.backend} if attention and attention.seconds else {}

    def write_checkpoint(metrics: dict[str, Any]) -> None:
        if best is not None and first and loop.evaluated_step == progress.step:
            best.offer(progress.step, metrics["eval"])
        artifact = saver.save(metrics | kernel)
        saved.append(artifact)
        session.reporter.event("checkpoint", step=progress.step, path=str(artifact.path))

    log = _log(save, progress, job.config) if first else NoLog()
    loop = Loop(
        job.config,
        run.stepper,
        _batches_to_train(run),
        progress,
        log,
        session.reporter,
        write_checkpoint,
    )
    with stop_on_signals() as stop:
        try:
            loop.run(stop)
        finally:
            log.close()
            if job.config.logging.plots and first:
                write_plots(save / "metrics.jsonl", save / "plots")
    if best is not None and best.text:
        session.reporter.info(best.text)
    # Nothing is saved again where less than a step was left to train on.
    if not saved and run.start.folder is not None:
        return open_artifact(run.start.folder, "checkpoint")
    return saved[-1]


def _batches_to_train(run: Run) -> RunData:
    """With ``--profile`` the steps that take some of them are profiled."""
    ranks, steps = run.stepper.ranks, run.job.config.logging.profile
    folder = run.job.save / "profile"
    return replace(
        run.batches, train=profiled(run.batches.train, steps, folder, ranks.rank, ranks.device)
    )


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
