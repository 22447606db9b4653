"""``mtk verify resume``: stopped and continued training beside training straight on.

Three runs in the asked layout: straight to the end without saving before; the same with a
checkpoint on the way; and one that has nothing but that checkpoint and continues it. All
tensors of the three last checkpoints (weights, optimizer, random states) must be the same bytes.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtk.artifacts import Artifact
from mtk.checkpoint.steps import step_folder
from mtk.checkpoint.tensors import read_index, read_tensors
from mtk.config.masking import MASKING_OPTIONS, WINDOW_OPTIONS
from mtk.config.pretrain import LengthConfig, LoggingConfig, SaveConfig
from mtk.config.verify import VerifyResumeConfig
from mtk.log import Reporter
from mtk.models.count_families import ASSUMED_VOCAB_SIZE
from mtk.parallel.legal_layouts import name
from mtk.session import Session
from mtk.verification.prepare import small

PARTS = ("model", "optimizer", "random")
# What trains a run: the pretraining stage's function.
Train = Callable[[Any, Session], Artifact]


@dataclass(frozen=True)
class ResumeProof:
    """compared: tensors of each part. differing: ``run: tensor`` for each that is not the
    same bytes as after training straight on."""

    layout: str
    ranks: int
    device: str
    steps: int
    stop_at: int
    compared: dict[str, int]
    differing: list[str]

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {**vars(self), "equal": not self.differing}

    def lines(self) -> list[str]:
        """For people."""
        counts = ", ".join(f"{count} {part}" for part, count in self.compared.items())
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return [
            f"layout {self.layout}: {ranks} on {self.device}",
            f"{self.steps} steps straight on, and {self.stop_at} + {self.steps - self.stop_at} "
            f"steps with a stop between",
            f"compared bit for bit: {counts} tensors",
            *(f"DIFFERENT: {text}" for text in self.differing),
            f"verdict: {'DIFFERENT' if self.differing else 'equal'}",
        ]


def prove_resume(
    config: VerifyResumeConfig, device: str, train: Train, reporter: Reporter
) -> ResumeProof:
    """Train three times in temporary folders and compare. Raises what training raises."""
    steps, stop_at = config.steps, config.stop_at
    config, notes = _prepared(config, device)
    for note in notes:
        reporter.info(note)
    session = Session(Reporter(quiet=True))
    with tempfile.TemporaryDirectory(prefix="mtk-verify-") as temporary:
        straight, stopped, continued = (
            Path(temporary, run) for run in ("straight", "stopped", "continued")
        )
        reporter.info(f"training {steps} steps straight on")
        train(_run(config, straight, steps), session)
        reporter.info(f"training {steps} steps with a checkpoint of step {stop_at}")
        train(_run(config, stopped, stop_at), session)
        continued.mkdir()
        shutil.copytree(step_folder(stopped, stop_at), step_folder(continued, stop_at))
        reporter.info(f"continuing from step {stop_at}")
        train(_run(config, continued, steps), session)
        last = step_folder(straight, steps)
        differing = [
            f"{run.name}: {text}"
            for run in (stopped, continued)
            for text in differences(last, step_folder(run, steps))
        ]
        compared = {part: len(read_index(last, part)) for part in _parts(last)}
    return ResumeProof(
        name(config.parallel), config.world, device, steps, stop_at, compared, differing
    )


def _prepared(config: VerifyResumeConfig, device: str) -> tuple[VerifyResumeConfig, list[str]]:
    notes: list[str] = []
    if config.check.shrink:
        config, notes = small(config)
        notes.append("data: generated, as the vocabulary is shrunk")
    data = config.data
    given = data.data_path or data.train_data_path
    if config.check.shrink or not given:
        # Its class asks for no rules: generated tokens exclude the paths.
        keep = {name: getattr(data, name) for name in WINDOW_OPTIONS + MASKING_OPTIONS}
        data = dataclasses.replace(type(data)(mock_data=True), **keep)
    model = config.model
    if model.vocab_size is None and data.mock_data:
        model = dataclasses.replace(model, vocab_size=ASSUMED_VOCAB_SIZE[model.family])
        notes.append(f"vocabulary: {model.vocab_size} assumed (--vocab-size)")
    runtime = dataclasses.replace(config.runtime, device=device)  # type: ignore[arg-type]
    if device == "cuda" and not runtime.deterministic_mode:
        runtime = dataclasses.replace(runtime, deterministic_mode=True)
        notes.append("--deterministic-mode: on, as other kernels differ from run to run on CUDA")
    return dataclasses.replace(
        config, data=data, model=model, runtime=runtime, batch=_steady(config)
    ), notes


def _steady(config: VerifyResumeConfig) -> Any:
    return dataclasses.replace(config.batch, rampup_batch_size=None)


def _run(config: VerifyResumeConfig, folder: Path, save_interval: int) -> VerifyResumeConfig:
    """So many steps, in the unit in which the schedule counts; nothing else is written."""
    steps, samples = config.steps, config.steps * config.batch.full
    by_samples = config.length.train_samples or config.length.train_tokens
    length = LengthConfig(train_samples=samples) if by_samples else LengthConfig(train_iters=steps)
    save = SaveConfig(
        save=str(folder),
        save_interval=save_interval,
        keep_checkpoints=0,
        max_shard_size=config.checkpoint.max_shard_size,
    )
    logging = LoggingConfig(log_interval=1, eval_iters=0, eval_interval=steps + 1, plots=False)
    return dataclasses.replace(
        config,
        length=length,  # type: ignore[arg-type]
        checkpoint=save,  # type: ignore[arg-type]
        logging=logging,
    )


def _parts(folder: Path) -> list[str]:
    return [part for part in PARTS if (folder / f"{part}.index.json").is_file()]


def differences(one: Path, other: Path) -> list[str]:
    """Tensors of two checkpoints that are not the same bytes, or that one of them lacks."""
    found = [f"{part}: only in one" for part in sorted({*_parts(one)} ^ {*_parts(other)})]
    for part in [part for part in _parts(one) if part in _parts(other)]:
        ours, theirs = read_tensors(one, part), read_tensors(other, part)
        found += [f"{part}: {key} is in one only" for key in sorted(ours.keys() ^ theirs.keys())]
        common = sorted(ours.keys() & theirs.keys())
        found += [f"{part}: {key}" for key in common if not _same_bytes(ours[key], theirs[key])]
    return found


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (x.contiguous().view(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(first, second)
