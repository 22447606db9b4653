"""From preprocessed datasets to the batches of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtk.artifacts.hashing import sha256_json
from mtk.config.masking import MASKING_OPTIONS, SPECIAL_TOKENS
from mtk.config.pretrain import PretrainConfig
from mtk.data.batch_schedule import BatchSchedule
from mtk.data.build import SampleCounts, build_splits
from mtk.data.gpt_samples import end_of_document
from mtk.data.indexed_dataset import IndexedDataset
from mtk.data.loader import BatchLoader
from mtk.data.packing import Packing
from mtk.data.sampler import micro_batches
from mtk.data.token_source import SampleDataset
from mtk.errors import ConfigError, Problem
from mtk.log import Reporter
from mtk.tokenizers import Tokenizer, load_tokenizer
from mtk.training.batch import GlobalBatch
from mtk.training.loop import Batches, RunData
from mtk.training.opened_data import PATHS, OpenedData
from mtk.training.sample_kinds import sample_kind


def with_vocabulary(config: PretrainConfig, data: OpenedData) -> PretrainConfig:
    """The configuration with the vocabulary size that the data need.

    Raises ConfigError when the size given is smaller, or none is known.
    """
    given, needed = config.model.vocab_size, data.vocab_size
    if given is None and needed is None:
        rule = "is not known: the datasets have no manifest that names their tokenizer"
        fix = "Give the number of ids of the tokenizer they were made with."
        raise ConfigError([Problem("model.vocab_size", None, rule, fix)])
    if given is not None and needed is not None and given < needed:
        rule = f"the data's tokenizer has {needed} ids"
        fix = f"Nearest: {needed}, or leave it out."
        raise ConfigError([Problem("model.vocab_size", given, rule, fix)])
    model = dataclasses.replace(config.model, vocab_size=given or needed)
    return dataclasses.replace(config, model=model)


def target_samples(config: PretrainConfig) -> int:
    """Samples of the whole run: a multiple of the steps that fit. Raises ConfigError."""
    schedule = batch_schedule(config)
    length = config.length
    if length.train_iters is not None:
        return schedule.consumed(length.train_iters)
    samples = length.train_samples
    if samples is None:
        assert length.train_tokens is not None
        samples = -(-length.train_tokens // config.model.seq_length)
    steps = schedule.steps(samples)
    if steps == 0:
        rule = f"is less than one global batch of {schedule.at(0)} samples"
        raise ConfigError([Problem("length.train_samples", samples, rule)])
    return schedule.consumed(steps)


def batch_schedule(config: PretrainConfig) -> BatchSchedule:
    return BatchSchedule(config.batch.full, config.batch.rampup_batch_size)


def data_identity(config: PretrainConfig, data: OpenedData, samples: int) -> str:
    """Digest of what decides which sample comes when; paths and caches do not count.

    ``samples`` only counts for Megatron's order, which depends on the training length.
    """
    options = config.data
    content = {
        "datasets": [record.digest for record in data.inputs()],
        "weights": [_weights(getattr(options, name)) for name in PATHS],
        "split": options.split,
        "order": options.data_order,
        "length": samples if options.data_order == "megatron" else None,
        "sequence": config.model.seq_length,
        "eod_mask_loss": options.eod_mask_loss,
        "reset_attention_mask": options.reset_attention_mask,
        "reset_position_ids": options.reset_position_ids,
        "mock": options.mock_data,
    }
    if config.model.family in SPECIAL_TOKENS:
        content["family"] = config.model.family
        content["masking"] = [getattr(options, name) for name in MASKING_OPTIONS]
        content["pairs"] = config.model.bert_binary_head
        content["decoder"] = config.model.decoder_seq_length
    return sha256_json(content)


def _weights(items: Sequence[str]) -> list[str]:
    """Weights and names without folders: a dataset may be moved."""
    return [Path(item).name for item in items]


@dataclass(frozen=True)
class Share:
    """How one of the data-parallel ranks reads.

    micro: samples of a micro-batch. packing: what the documents inside a sample mean.
    sequences: of each sample.
    """

    micro: int
    rank: int = 0
    size: int = 1
    packing: Packing | None = None
    sequences: int = 1


def run_data(
    config: PretrainConfig,
    data: OpenedData,
    samples: int,
    reporter: Reporter,
    rank: int = 0,
    size: int = 1,
    counted: int | None = None,
) -> RunData:
    """Datasets, loaders and the bytes-per-token table of a run, for one of ``size``
    data-parallel ranks. counted: samples after which the others only fill the last step. Raises
    DataError, and ConfigError where an option needs an EOD that is not known."""
    schedule = batch_schedule(config)
    fixed = config.logging.eval_iters * schedule.full
    splits = build_splits(
        config.data,
        sample_kind(config, data, reporter.info),
        SampleCounts(train=samples, valid=fixed, test=fixed),
        IndexedDataset,
        notify=reporter.info,
    )
    assert splits.train is not None
    packed = packing(config, data, reporter)
    train, share = splits.train, Share(config.batch.micro_batch_size, rank, size, packed)
    # Bits per byte compress a text; masked tokens are no text.
    bytes_V = None
    if config.model.family not in SPECIAL_TOKENS and data.tokenizer_folder is not None:
        bytes_V = token_bytes(load_tokenizer(data.tokenizer_folder), config.model.vocab_size)
    return RunData(
        train=lambda consumed: training_batches(
            train, consumed, samples, schedule.at, share, counted
        ),
        valid=held_out(splits.valid, fixed, share),
        test=held_out(splits.test, fixed, share),
        train_samples=samples,
        token_bytes_V=bytes_V,
        samples=train,
    )


def packing(config: PretrainConfig, data: OpenedData, reporter: Reporter) -> Packing | None:
    """What the documents inside a sample mean for this run; None where they mean nothing.

    Raises ConfigError if no EOD is known.
    """
    options = config.data
    if not options.reset_attention_mask and not options.reset_position_ids:
        return None
    eod = end_of_document(options, data.eod, config.model.vocab_size)
    assert eod is not None
    for dataset in data.datasets:
        if dataset.artifact is not None and not dataset.artifact.metrics.get("append_eod", True):
            reporter.warn(
                f"{dataset.prefix} was made without --append-eod: nothing tells where its "
                f"documents end, and --reset-attention-mask and --reset-position-ids do nothing"
            )
    return Packing(eod, options.reset_attention_mask, options.reset_position_ids)


def held_out(dataset: SampleDataset | None, samples: int, share: Share) -> Batches | None:
    """The first ``samples`` of a held-out split, or all it has.

    All ranks get equally many micro-batches of the same size, which collectives and pipelines
    need: what lacks in the last ones is filled with samples that do not count.
    """
    if dataset is None:
        return None
    count = min(samples, len(dataset))
    step = share.micro * share.size
    starts = [k + share.micro * share.rank for k in range(0, count, step)]
    real = [np.arange(k, min(k + share.micro, count)) for k in starts]
    filled = [np.concatenate([r, np.zeros(share.micro - len(r), dtype=r.dtype)]) for r in real]

    def batches() -> Iterator[GlobalBatch]:
        with closing(BatchLoader(dataset, filled, packing=share.packing)) as loader:
            for positions, batch in zip(real, loader, strict=True):
                batch.uncount(len(positions))
                yield GlobalBatch([batch], samples=len(positions))

    return batches


def training_batches(
    dataset: SampleDataset,
    start: int,
    stop: int,
    size_at: Callable[[int], int],
    share: Share,
    counted: int | None = None,
) -> Iterator[GlobalBatch]:
    """Global batches from a cursor on, read ahead by one thread. Samples from ``counted`` on
    count for nothing."""
    consumed = start
    order = micro_batches(start, stop, size_at, share.micro, share.rank, share.size)
    with closing(BatchLoader(dataset, order, packing=share.packing)) as loader:
        while (size := size_at(consumed)) <= stop - consumed:
            own = size // (share.micro * share.size)
            mine = [next(loader) for _ in range(own)]
            if counted is not None and consumed + size > counted:
                for batch in mine:
                    batch.uncount(sum(k < counted for k in batch.indices_B))
            yield GlobalBatch(mine, samples=size, sequences=share.sequences)
            consumed += size


def token_bytes(tokenizer: Tokenizer, vocab_size: int | None) -> Tensor | None:
    """int64 [V]: bytes of text behind each id; None if the tokenizer cannot say."""
    if vocab_size is None:
        return None
    lengths = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    if any(piece is None for piece in lengths):
        return None
    counts = [len(piece or b"") for piece in lengths]
    return torch.tensor(counts + [0] * (vocab_size - len(counts)))
