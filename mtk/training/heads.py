"""Finetuning BERT with the head of a task: RACE, MNLI, QQP."""

from __future__ import annotations

from mtk.artifacts.hashing import sha256_json
from mtk.config.finetune import FinetuneConfig
from mtk.config.heads import TASKS
from mtk.config.pretrain import PretrainConfig
from mtk.data.epochs import ShuffledEpochs
from mtk.errors import DataError
from mtk.evaluation.classification import ClassificationData
from mtk.evaluation.task_files import files_of, read_task, unique_names
from mtk.log import Reporter
from mtk.training.accuracy import AccuracyJudge
from mtk.training.data import Share, batch_schedule, target_samples, training_batches
from mtk.training.head_data import HeadSamples
from mtk.training.job import Job, with_samples
from mtk.training.loop import RunData
from mtk.training.pretrained import Pretrained
from mtk.training.task_data import TaskFiles


def _require_labels(data: ClassificationData) -> None:
    """Raises DataError for a file of one label: test files hold none, and are read as such."""
    first = data.label(0)
    if len(data) > 1 and all(data.label(k) == first for k in range(len(data))):
        path = data.origin(0).rpartition(":")[0]
        raise DataError(
            f"all {len(data)} samples of {path} have the label {first}, so there is nothing to "
            f"learn. The labels of test files are not published; train on train.tsv."
        )


def head_job(
    stage: str, config: FinetuneConfig, core: PretrainConfig, base: Pretrained, reporter: Reporter
) -> Job:
    """Raises ConfigError, DataError, and CheckpointError without a tokenizer."""
    task, length = TASKS[config.task], core.model.seq_length
    tokenizer = base.tokenizer()
    files = TaskFiles.open(
        files_of(task, config.train_data), files_of(task, config.valid_data), tokenizer
    )
    train, valid = (
        [read_task(task, path, tokenizer, length, reporter.warn) for path in paths]
        for paths in (config.train_data, config.valid_data)
    )
    for data in train if task.choices == 1 else ():
        _require_labels(data)
    dataset = HeadSamples(train, core.model.vocab_size)
    reporter.info(
        f"{task.name}: {len(dataset)} samples to train on, {sum(map(len, valid))} held out"
    )
    epoch, epochs = len(dataset), config.length.epochs
    if epochs is not None:
        core = with_samples(core, epochs * epoch)
    samples = target_samples(core)
    ordered = ShuffledEpochs(dataset, epochs * epoch if epochs else samples, core.runtime.seed)
    held = dict(zip(unique_names(valid), valid, strict=True))

    def batches(reporter: Reporter, rank: int, size: int) -> RunData:
        share = Share(core.batch.micro_batch_size, rank, size, sequences=task.choices)
        schedule = batch_schedule(core)
        judge = AccuracyJudge(held, share, job.save / "predictions", reporter) if held else None
        return RunData(
            train=lambda consumed: training_batches(ordered, consumed, samples, schedule.at, share),
            valid=None,
            test=None,
            train_samples=samples,
            token_bytes_V=None,
            epoch=epoch if epochs else None,
            judge=judge,
            samples=ordered,
        )

    identity = sha256_json([config.task, files.train_digests, tokenizer.fingerprint, length])
    job = Job(stage, config, core, samples, files, identity, batches, base, "accuracy")
    return job
