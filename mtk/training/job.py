"""What a stage wants to be trained; one run serves pretraining and all kinds of finetuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtk.artifacts import InputRecord
from mtk.config.pretrain import LengthConfig, PretrainConfig
from mtk.log import Reporter
from mtk.training.data import batch_schedule
from mtk.training.loop import RunData
from mtk.training.pretrained import Pretrained


class TrainedOn(Protocol):
    """What is known of the training data. fingerprint, tokenizer_folder: of its tokenizer, or
    None; inputs: records of it, in the role "training data"; save_tokenizer: into a folder of a
    checkpoint, if there is one."""

    @property
    def fingerprint(self) -> str | None: ...
    @property
    def tokenizer_folder(self) -> Path | None: ...
    def inputs(self) -> list[InputRecord]: ...
    def save_tokenizer(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Job:
    """stage, recorded: what manifests name as the maker of checkpoints, and its options. config:
    of the core. samples: of the whole run. data_digest: of what decides which sample comes
    when. batches(reporter, rank, size): what one of ``size`` data-parallel ranks reads. base:
    weights to begin from, in place of initial ones. figure: of an evaluation, by which the
    best checkpoint is kept beside the newest; ``-`` in front: the lower the better.
    """

    stage: str
    recorded: Any
    config: PretrainConfig
    samples: int
    data: TrainedOn
    data_digest: str
    batches: Callable[[Reporter, int, int], RunData]
    base: Pretrained | None = None
    figure: str | None = None

    @property
    def save(self) -> Path:
        return Path(self.config.checkpoint.save)


def with_samples(core: PretrainConfig, samples: int) -> PretrainConfig:
    """The core's configuration with a length of at least ``samples``, in whole steps."""
    full = batch_schedule(core).full
    length = LengthConfig(train_samples=-(-samples // full) * full)
    return dataclasses.replace(core, length=length)
