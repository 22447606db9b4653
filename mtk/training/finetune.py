"""Finetuning as jobs of the training core: one function a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mtk.config.finetune import HEAD_TASKS, FinetuneConfig
from mtk.config.given_model import complete
from mtk.config.heads import TASKS
from mtk.config.model import ModelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.data.blend import parse_blend
from mtk.data.build import SampleCounts, build_splits
from mtk.data.indexed_dataset import IndexedDataset
from mtk.errors import ConfigError, Problem
from mtk.log import Reporter
from mtk.training.compatibility import check_tokenizer
from mtk.training.data import (
    data_identity,
    run_data,
    target_samples,
    with_vocabulary,
)
from mtk.training.heads import head_job
from mtk.training.job import Job, with_samples
from mtk.training.loop import RunData
from mtk.training.opened_data import OpenedData, open_data
from mtk.training.pretrained import Pretrained
from mtk.training.sample_kinds import sample_kind
from mtk.training.sft import sft_job

STAGE = "finetune"


def finetuned_model(config: FinetuneConfig, base: Pretrained) -> ModelConfig:
    """What is trained: the checkpoint's model with what the task adds. Raises ConfigError,
    also for a family that the task is not for."""
    model = complete(config.model, base.model, config.pretrained_checkpoint)
    head, path = base.model.task_head, config.pretrained_checkpoint
    if config.task in HEAD_TASKS and base.model.family != "bert":
        rule = f"puts a head on BERT; {path} is of family {base.model.family}"
        raise ConfigError([Problem("task", config.task, rule, "Give a checkpoint of BERT.")])
    if config.task == "sft" and base.model.family != "gpt":
        rule = f"writes answers token by token; {path} is of family {base.model.family}"
        raise ConfigError([Problem("task", "sft", rule, "Give a checkpoint of family gpt.")])
    if head not in (None, config.task):
        rule = f"{path} has the head of {head}, and nothing of those of pretraining"
        fix = f"Begin from what it was made from, or use --task {head}."
        raise ConfigError([Problem("task", config.task, rule, fix)])
    changes: dict[str, Any] = {"lora": config.lora}
    if config.task in HEAD_TASKS:
        classes = TASKS[config.task].classes
        changes |= {"task_head": config.task, "num_classes": classes, "bert_binary_head": False}
    model = dataclasses.replace(model, **changes)
    problems = [dataclasses.replace(p, key=f"model.{p.key}") for p in model.problems()]
    if problems:
        raise ConfigError(problems)
    return model


def finetune_job(config: FinetuneConfig, base: Pretrained, reporter: Reporter) -> Job:
    """The job of one rank. Raises ConfigError, DataError and CheckpointError."""
    core = config.core(finetuned_model(config, base))
    return MAKERS[config.task](config, core, base, reporter)


# -- lm ---------------------------------------------------------------------------------


def _lm(config: FinetuneConfig, core: PretrainConfig, base: Pretrained, reporter: Reporter) -> Job:
    """Continued training on token datasets."""
    data = open_data(core.data)
    if base.source.folder.is_dir():
        check_tokenizer(base.source.folder, data.tokenizer_folder)
    core = with_vocabulary(core, data)
    epoch = counted = None
    if config.length.epochs is not None:
        epoch = _samples_of_epoch(core, data)
        counted = config.length.epochs * epoch
        core = with_samples(core, counted)
    samples = target_samples(core)

    def batches(reporter: Reporter, rank: int, size: int) -> RunData:
        found = run_data(core, data, samples, reporter, rank, size, counted)
        return dataclasses.replace(found, epoch=epoch)

    digest = data_identity(core, data, samples)
    return Job(STAGE, config, core, samples, data, digest, batches, base, "-loss")


def _samples_of_epoch(core: PretrainConfig, data: OpenedData) -> int:
    """Samples that one pass over the training data makes. Raises ConfigError for a blend."""
    options = core.data
    items = options.train_data_path or options.data_path
    if options.mock_data or len(parse_blend(items, "--data-path").prefixes) > 1:
        rule = "several datasets, or generated ones, have no epoch in common"
        fix = "Give --train-iters, --train-samples or --train-tokens."
        raise ConfigError([Problem("length.epochs", None, rule, fix)])
    kind = sample_kind(core, data)
    splits = build_splits(options, kind, SampleCounts(train=1), IndexedDataset)
    assert splits.train is not None
    return len(splits.train)


Maker = Callable[[FinetuneConfig, PretrainConfig, Pretrained, Reporter], Job]
MAKERS: Mapping[str, Maker] = {
    "lm": _lm,
    "sft": partial(sft_job, STAGE),
    **{task: partial(head_job, STAGE) for task in HEAD_TASKS},
}
