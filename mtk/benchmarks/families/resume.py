"""A run that stopped half-way and continued, held against the same run straight on.

Dropout is on, so that random states count. What is compared are the SHA-256 of the published
files: weights, optimizer, random states.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts.hashing import sha256_file
from mtk.benchmarks.families.corpus import Corpus, Stages
from mtk.benchmarks.families.training import training
from mtk.checkpoint.steps import step_folder
from mtk.config.family_samples import FamilySample
from mtk.session import Session
from mtk.verification.resume import PARTS, differences

STEPS = 10
STOP_AT = 5
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@dataclass(frozen=True)
class ResumeCell:
    """straight, continued: SHA-256 of each file of the last checkpoint. tensors: those that
    differ."""

    straight: dict[str, str]
    continued: dict[str, str]
    tensors: list[str]

    @property
    def failures(self) -> list[str]:
        if self.straight == self.continued and not self.tensors:
            return []
        names = sorted(self.straight.keys() | self.continued.keys())
        other = [n for n in names if self.straight.get(n) != self.continued.get(n)]
        return [f"resume: {', '.join(self.tensors[:3] or other)} differ"]

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {
            "steps": STEPS,
            "stop_at": STOP_AT,
            "sha256": self.straight,
            "sha256_continued": self.continued,
            "failures": self.failures,
        }


def compare_resume(
    sample: FamilySample, corpus: Corpus, folder: Path, stages: Stages, session: Session, seed: int
) -> ResumeCell:
    """Train in ``folder``. Raises what the stage raises."""
    whole, parts = folder / "straight", folder / "continued"
    common = {**DROPOUT, "train_iters": STEPS, "keep_checkpoints": 0, "seed": seed}
    config = training(sample, corpus, whole, **common, save_interval=STOP_AT)
    stages.pretrain(config, session)
    shutil.copytree(step_folder(whole, STOP_AT), step_folder(parts, STOP_AT))
    config = training(sample, corpus, parts, **common, save_interval=STEPS)
    stages.pretrain(config, session)
    ours, theirs = step_folder(whole, STEPS), step_folder(parts, STEPS)
    return ResumeCell(_digests(ours), _digests(theirs), differences(ours, theirs))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for part in PARTS for path in folder.glob(f"{part}-*.safetensors"))
    return {path.name: sha256_file(path) for path in files}
