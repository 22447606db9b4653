"""Stage pretrain: datasets -> checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtk.artifacts import Artifact, InputRecord, open_artifact, verify
from mtk.checkpoint.save import save_checkpoint
from mtk.checkpoint.steps import prune_steps, step_folder
from mtk.config.pretrain import PretrainConfig
from mtk.data.stop import terminate_cleanly
from mtk.errors import CheckpointError, LayoutError, Problem
from mtk.models.attention import AttentionKernel, flash_kernel, sdpa_kernel
from mtk.models.build import build_model
from mtk.models.init import initialize
from mtk.parallel.apply import apply, require_supported, training_device
from mtk.parallel.deterministic import set_deterministic
from mtk.precision.loss_scale import LossScale
from mtk.precision.main_weights import COMPUTE_DTYPES, MainWeights
from mtk.session import Session
from mtk.training.data import (
    OpenedData,
    data_identity,
    open_data,
    run_data,
    target_samples,
    with_vocabulary,
)
from mtk.training.loop import Loop, RunData
from mtk.training.metrics import MetricsLog, check_tensorboard
from mtk.training.optimizer import Optimizer
from mtk.training.plots import write_plots
from mtk.training.progress import RunProgress
from mtk.training.resume import Start, exclusive, find_start, start_over
from mtk.training.schedule import Schedule
from mtk.training.state import Identity, gather, restore, restore_weights
from mtk.training.step import Stepper
from mtk.training.stop import stop_on_signals


@terminate_cleanly()
def run(config: PretrainConfig, session: Session | None = None) -> Artifact:
    """Train until the length is reached; returns the last checkpoint.

    The same call continues an interrupted run bit for bit, and returns at once when the
    run is complete. Raises MtkError subclasses: ConfigError, DataError, CheckpointError,
    GateError (loss not finite), Interrupted (signal; state saved).
    """
    session = session or Session()
    require_supported(config.parallel)
    data = open_data(config.data)
    config = with_vocabulary(config, data)
    samples = target_samples(config)
    stepper = make_stepper(config, samples)
    save = Path(config.checkpoint.save)
    start = Start() if session.force else find_start(config, save, samples, data)
    if start.finished is not None:
        session.reporter.info(f"{start.folder} is already complete; nothing to train.")
        return start.finished
    # Everything that can be wrong with the data is found before anything is written.
    check_tensorboard(config.logging.tensorboard_dir)
    batches = run_data(config, data, samples, session.reporter)
    identity = Identity(
        data_identity(config, data, samples),
        data.fingerprint,
        config.runtime.seed,
        config.precision.precision,
    )
    with exclusive(save):
        if session.force:
            start_over(save)
        elif find_start(config, save, samples, data) != start:
            raise CheckpointError(
                f"another run wrote checkpoints into {save} while this one was prepared. Repeat "
                f"the command to continue them, or use another --save."
            )
        progress = begin(start, stepper, identity, config, session)
        prepared = Run(config, session, stepper, data, batches, identity, save, start)
        return train(prepared, progress)


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


def make_stepper(config: PretrainConfig, samples: int) -> Stepper:
    """Model with initial weights, optimizer and schedule on the training device."""
    runtime = config.runtime
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    set_deterministic(runtime)
    device = training_device(runtime)
    model = build_model(config.model, attention_kernel(config, device))
    initialize(model, config.model, runtime.seed)
    main = MainWeights(model.to(device), COMPUTE_DTYPES[config.precision.precision])
    apply(model, config.parallel, runtime)
    return Stepper(
        model,
        main,
        Optimizer(main.weights, config.optimizer),
        Schedule.from_config(config, samples),
        LossScale.start(config.precision),
        device,
    )


def attention_kernel(config: PretrainConfig, device: torch.device) -> AttentionKernel:
    """The kernel asked for. Raises LayoutError where flash attention has none for this run."""
    if config.runtime.attention_backend != "flash":
        return sdpa_kernel
    rule = ""
    if device.type == "cpu" and config.model.attention_dropout:
        rule = "flash attention has no dropout on the CPU"
    if device.type == "cuda" and config.precision.precision == "fp32":
        rule = "flash attention needs bf16 or fp16 on CUDA"
    if rule:
        fix = "Use --attention-backend auto, or --attention-dropout 0 (CPU), --bf16 (CUDA)."
        raise LayoutError([Problem("runtime.attention_backend", "flash", rule, fix)])
    return flash_kernel


def begin(
    start: Start, stepper: Stepper, identity: Identity, config: PretrainConfig, session: Session
) -> RunProgress:
    """Bring the state to where the run starts."""
    torch.manual_seed(config.runtime.seed)
    if start.folder is None:
        return RunProgress()
    for warning in start.warnings:
        session.reporter.warn(warning)
    # Training on from weights that changed on disk would go unnoticed.
    verify(open_artifact(start.folder, "checkpoint"))
    if start.weights_only:
        restore_weights(stepper, start.folder)
        session.reporter.info(f"weights from {start.folder}; step 0, fresh optimizer")
        return RunProgress()
    progress = restore(stepper, start.folder, identity)
    session.reporter.info(f"continuing {start.folder} at step {progress.step}")
    return progress


def train(run: Run, progress: RunProgress) -> Artifact:
    """Run the loop; every checkpoint is an artifact below ``run.save``."""
    config, save, session = run.config, run.save, run.session
    inputs = run.data.inputs() + initial_model(run.start, save)
    saved: list[Artifact] = []

    def write_checkpoint(metrics: dict[str, Any]) -> None:
        content = gather(
            run.stepper, progress, run.identity, config.model, run.data.tokenizer_folder
        )
        artifact = save_checkpoint(
            step_folder(save, progress.step),
            content,
            stage="pretrain",
            config=config,
            inputs=inputs,
            metrics={"step": progress.step, "tokens": progress.consumed_tokens, **metrics},
            command=session.command,
            force=True,
            max_shard_size=config.checkpoint.max_shard_size,
        )
        prune_steps(save, config.checkpoint.keep_checkpoints)
        saved.append(artifact)
        session.reporter.event("checkpoint", step=progress.step, path=str(artifact.path))

    log = MetricsLog(save / "metrics.jsonl", progress.step, config.logging.tensorboard_dir)
    loop = Loop(config, run.stepper, run.batches, progress, log, session.reporter, write_checkpoint)
    with stop_on_signals() as stop:
        try:
            loop.run(stop)
        finally:
            log.close()
            if config.logging.plots:
                write_plots(save / "metrics.jsonl", save / "plots")
    return saved[-1]


def initial_model(start: Start, save: Path) -> list[InputRecord]:
    """What a run was continued or finetuned from, when that lies outside its own folder."""
    if start.folder is None:
        return []
    artifact = open_artifact(start.folder, "checkpoint")
    if start.folder.parent != save:
        return [artifact.as_input("initial model")]
    return [record for record in artifact.inputs if record.role == "initial model"]
