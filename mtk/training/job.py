"""What a stage wants to be trained; one run serves pretraining and all kinds of finetuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtk.artifacts import InputRecord
from mtk.config.pretrain import PretrainConfig
from mtk.log import Reporter
from mtk.training.loop import RunData
from mtk.training.pretrained import Pretrained


class TrainedOn(Protocol):
    """What is known of the training data. inputs: records of it, in the role "training data";
    fingerprint, tokenizer_folder: of its tokenizer, or None."""

    @property
    def fingerprint(self) -> str | None: ...
    @property
    def tokenizer_folder(self) -> Path | None: ...
    def inputs(self) -> list[InputRecord]: ...


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
