"""Options of ``mtk finetune``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

from mtk.config.chat import ChatConfig
from mtk.config.given_model import GivenModel
from mtk.config.heads import TASKS
from mtk.config.lora import LoraConfig
from mtk.config.model import ModelConfig
from mtk.config.optimization import OptimizerConfig, PrecisionConfig, ScheduleConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import (
    BatchConfig,
    DataConfig,
    LengthConfig,
    LoggingConfig,
    OutputConfig,
    PretrainConfig,
    RuntimeConfig,
    SaveConfig,
)
from mtk.config.schema import group, option
from mtk.config.world_rules import smallest_batch, world_size
from mtk.errors import ConfigError, Problem

HEAD_TASKS = tuple(TASKS)


@dataclass(frozen=True, kw_only=True)
class TokenDataConfig(DataConfig):
    """Datasets of ``--task lm``; the other tasks have none."""

    def problems(self) -> Iterator[Problem]:
        if self.given:
            yield from super().problems()

    @property
    def given(self) -> dict[str, object]:
        """What differs from the defaults, but for the folder of caches."""
        unset = DataConfig()
        return {
            name: value
            for name, value in vars(self).items()
            if value != getattr(unset, name) and name != "data_cache_path"
        }


@dataclass(frozen=True, kw_only=True)
class FinetuneLengthConfig(LengthConfig):
    """How long to train; exactly one of the four."""

    epochs: int | None = option(
        None, help="Times that every training sample is seen; each ends with an evaluation."
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneLoggingConfig(LoggingConfig):
    """As in pretraining, but evaluations come at the ends of epochs unless asked for."""

    eval_interval: int = option(
        0, help="Steps between evaluations; 0: only after each epoch and at the end.", runtime=True
    )
    eval_iters: int = option(
        0,
        help="Global batches per evaluation; always the same samples. 0: all that are held out "
        "(lm: 10 batches).",
        runtime=True,
    )

    def problems(self) -> Iterator[Problem]:
        if self.eval_interval < 0:
            yield Problem("eval_interval", self.eval_interval, "must not be negative")
        for problem in super().problems():
            if problem.key != "eval_interval":
                yield problem


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything ``mtk finetune`` needs."""

    task: Literal["lm", "sft", "RACE", "MNLI", "QQP"] = option(
        help="lm: go on with plain text; sft: conversations, loss on the answers; RACE, MNLI, "
        "QQP: a head on BERT."
    )
    pretrained_checkpoint: str = option(
        help="Checkpoint or Hugging Face directory whose weights to begin from; training starts "
        "at step 0 with a fresh optimizer.",
        runtime=True,
    )
    train_data: tuple[str, ...] = option(
        (), help="Files of conversations (sft), folders (RACE) or .tsv files.", runtime=True
    )
    valid_data: tuple[str, ...] = option((), help="As --train-data, held out.", runtime=True)
    chat: ChatConfig = group(ChatConfig, title="Conversations")
    lora: LoraConfig = group(LoraConfig, title="Adapters")
    model: GivenModel = group(GivenModel, title="Model (default: as the checkpoint)")
    data: TokenDataConfig = group(TokenDataConfig, title="Token datasets (--task lm)")
    batch: BatchConfig = group(BatchConfig, title="Batch")
    length: FinetuneLengthConfig = group(FinetuneLengthConfig, title="Length")
    optimizer: OptimizerConfig = group(OptimizerConfig, title="Optimizer")
    schedule: ScheduleConfig = group(ScheduleConfig, title="Learning rate")
    precision: PrecisionConfig = group(PrecisionConfig, title="Precision")
    parallel: ParallelConfig = group(ParallelConfig, title="Layout and memory")
    checkpoint: OutputConfig = group(OutputConfig, title="Checkpoints")
    logging: FinetuneLoggingConfig = group(FinetuneLoggingConfig, title="Logging and evaluation")
    runtime: RuntimeConfig = group(RuntimeConfig, title="Runtime")

    @property
    def world(self) -> int:
        """Ranks of the run: those that are started already, else --nproc."""
        return world_size(self.parallel.nproc)

    def problems(self) -> Iterator[Problem]:
        if self.task == "lm":
            yield from self._datasets()
        else:
            yield from self._files()
        if self.task != "sft" and self.chat != ChatConfig():
            for name, value in vars(self.chat).items():
                if value != getattr(ChatConfig(), name):
                    yield Problem(f"chat.{name}", value, "belongs to --task sft", "Leave it out.")
        if self.length.epochs is not None and self.batch.rampup_batch_size is not None:
            rule = "ramp-up needs a length in samples or tokens"
            yield Problem("length.epochs", self.length.epochs, rule, "Give --train-samples.")
        if self.task in HEAD_TASKS and self.length.train_tokens is not None:
            rule = f"samples of {self.task} are not counted in tokens"
            fix = "Give --epochs, --train-iters or --train-samples."
            yield Problem("length.train_tokens", self.length.train_tokens, rule, fix)
        if self.task in HEAD_TASKS and self.logging.eval_iters:
            rule = f"the accuracy of {self.task} is that of all held-out samples"
            yield Problem("logging.eval_iters", self.logging.eval_iters, rule, "Leave it out.")

    def _datasets(self) -> Iterator[Problem]:
        if not self.data.given:
            fix = "Give --data-path PREFIX (what mtk preprocess wrote)."
            yield Problem("data.data_path", self.data.data_path, "no data given", fix)
        for name in ("train_data", "valid_data"):
            if getattr(self, name):
                rule = "names files of sft, RACE, MNLI and QQP; --task lm reads token datasets"
                fix = "Give --data-path, or --train-data-path and --valid-data-path."
                yield Problem(name, getattr(self, name), rule, fix)

    def _files(self) -> Iterator[Problem]:
        if not self.train_data:
            fix = "Give --train-data FILE..."
            yield Problem("train_data", self.train_data, "no data given", fix)
        for name, value in self.data.given.items():
            rule = f"belongs to --task lm; --task {self.task} reads --train-data"
            yield Problem(f"data.{name}", value, rule, "Leave it out.")

    def derived(self) -> Self:
        """The batch in numbers, so that whatever reads the configuration sees the same one."""
        full = self.batch.global_batch_size
        full = full or smallest_batch(self.parallel, self.batch, self.world)
        batch = dataclasses.replace(self.batch, global_batch_size=full)
        return dataclasses.replace(self, batch=batch)

    def core(self, model: ModelConfig) -> PretrainConfig:
        """What the training core runs, for a model that is known; its length is open where it
        is given in epochs. Raises ConfigError where the two do not go together."""
        data, logging = DataConfig(**vars(self.data)), self.logging
        if self.task == "lm" and not logging.eval_iters:
            logging = dataclasses.replace(logging, eval_iters=LoggingConfig().eval_iters)
        if self.task == "sft" and self.chat.packing:
            positions = model.position_embedding_type != "none"
            data = dataclasses.replace(
                data, reset_attention_mask=True, reset_position_ids=positions
            )
        length = {name: value for name, value in vars(self.length).items() if name != "epochs"}
        core = PretrainConfig(
            model=model,
            data=data,
            batch=self.batch,
            length=LengthConfig(**length),
            optimizer=self.optimizer,
            schedule=self.schedule,
            precision=self.precision,
            parallel=self.parallel,
            checkpoint=SaveConfig(**vars(self.checkpoint)),
            logging=logging,
            runtime=self.runtime,
        )
        problems = list(core.training_problems())
        if problems:
            raise ConfigError(problems)
        return core
