"""Which documents the samples of a training step were made of, for every data-parallel rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mtk.artifacts import open_artifact
from mtk.config.finetune import FinetuneConfig
from mtk.config.pretrain import PretrainConfig
from mtk.data.build import MOCK
from mtk.data.dataset_artifact import open_dataset
from mtk.data.indexed_dataset import IndexedDataset
from mtk.data.provenance import Origin, find_origins, origins_of
from mtk.data.sampler import batch_indices
from mtk.data.token_places import DocumentPart, document_parts
from mtk.data.token_source import Piece, SampleDataset, TokenSource
from mtk.errors import CheckpointError, ConfigError, DataError, Problem
from mtk.log import Reporter
from mtk.training.data import (
    batch_schedule,
    data_identity,
    run_data,
    target_samples,
    with_vocabulary,
)
from mtk.training.finetune import finetune_job, finetuned_model
from mtk.training.opened_data import open_data
from mtk.training.pretrained import open_pretrained

TRAINING_RECORD = "training.json"


@dataclass(frozen=True)
class TracedRun:
    """A training as far as its data go. config: of the core. samples: those of the training, in
    its order. total: how many it takes. digest: of what decides which sample comes when. ranks:
    data-parallel ones, among which steps are dealt out."""

    config: PretrainConfig
    samples: SampleDataset
    total: int
    digest: str
    ranks: int


@dataclass(frozen=True)
class TracedPart:
    """A document, or conversation, that a sample is made of. part: None where only its origin
    is known. origin: the record of the corpus; None if unknown."""

    part: DocumentPart | None
    origin: Origin | None

    def to_dict(self) -> dict[str, Any]:
        place = {} if self.part is None else vars(self.part)
        return {**place, "origin": None if self.origin is None else self.origin.to_dict()}

    def __str__(self) -> str:
        words = []
        if (p := self.part) is not None:
            words.append(f"document {p.document}, tokens {p.begin}..{p.end} of {p.size}")
        if self.origin is not None:
            words.append(str(self.origin))
        return ": ".join(words)


@dataclass(frozen=True)
class TracedSample:
    """One sample of a step. sample: its number in the order of training. dataset: its prefix."""

    step: int
    rank: int
    micro_batch: int
    sample: int
    dataset: str
    parts: tuple[TracedPart, ...]

    def to_dict(self) -> dict[str, Any]:
        names = ("step", "rank", "micro_batch", "sample", "dataset")
        own = {name: getattr(self, name) for name in names}
        return {**own, "documents": [part.to_dict() for part in self.parts]}


@dataclass(frozen=True)
class Trace:
    """All samples of a step, by rank, micro-batch and place in it. unknown: by dataset, why the
    corpus behind some documents is not known."""

    samples: tuple[TracedSample, ...]
    unknown: Mapping[str, str] = field(default_factory=dict)


def pretraining(config: PretrainConfig, reporter: Reporter, ranks: int | None = None) -> TracedRun:
    """What ``mtk pretrain`` reads with these options. Raises ConfigError and DataError."""
    data = open_data(config.data)
    config = with_vocabulary(config, data)
    total = target_samples(config)
    found = run_data(config, data, total, reporter)
    assert found.samples is not None
    digest = data_identity(config, data, total)
    return TracedRun(config, found.samples, total, digest, ranks or config.data_parallel_size)


def finetuning(config: FinetuneConfig, reporter: Reporter, ranks: int | None = None) -> TracedRun:
    """What ``mtk finetune`` reads with these options. Raises ConfigError, DataError, and
    CheckpointError where what it began from cannot be opened."""
    base = open_pretrained(config.pretrained_checkpoint)
    core = config.core(finetuned_model(config, base))
    job = finetune_job(config, base, reporter)
    found = job.batches(reporter, 0, 1)
    assert found.samples is not None
    ranks = ranks or core.data_parallel_size
    return TracedRun(job.config, found.samples, job.samples, job.data_digest, ranks)


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of the data it was trained on. stage: "pretrain" or "finetune".
    ranks: data-parallel ones of its last start; None where it was alone."""

    stage: str
    config: Mapping[str, Any]
    step: int
    consumed: int
    digest: str
    ranks: int | None


def saved_run(folder: Path) -> SavedRun:
    """Read a checkpoint of a training. Raises CheckpointError for one that was converted."""
    artifact = open_artifact(folder, "checkpoint")
    path = folder / TRAINING_RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not {"progress", "identity"} <= set(record):
        raise CheckpointError(
            f"{folder} does not say what it was trained on: it was converted, or is not of a "
            f"training of mtk. Give the training's options with --config."
        )
    progress, layout = record["progress"], record.get("layout") or {}
    return SavedRun(
        artifact.stage,
        artifact.config,
        int(progress["step"]),
        int(progress["consumed_samples"]),
        record["identity"]["data"],
        layout.get("dp"),
    )


def check_same_data(run: TracedRun, saved: SavedRun, step: int) -> None:
    """Raise DataError where what is read now is not what the checkpoint was trained on, or
    its steps were not all of the batch that its configuration names."""
    if run.digest != saved.digest:
        raise DataError(
            "the datasets are not those that the checkpoint was trained on: their digest is "
            f"{run.digest[:16]}..., the checkpoint records {saved.digest[:16]}.... Restore them."
        )
    expected = batch_schedule(run.config).consumed(saved.step)
    if expected != saved.consumed:
        raise DataError(
            f"the checkpoint consumed {saved.consumed} samples in {saved.step} steps, but its "
            f"last configuration gives {expected}: the batch was changed on the way, so that "
            f"step {step} cannot be told from the configuration. Trace a checkpoint before the "
            f"change, or the configuration of that time with --config."
        )


def trace_step(run: TracedRun, step: int, *, verify_corpus: bool = True) -> Trace:
    """The samples that step ``step`` (1 is the first) learned from.

    verify_corpus: hash the corpus before its lines are believed. Raises ConfigError for a step
    that the training does not have, and DataError.
    """
    schedule = batch_schedule(run.config)
    last = schedule.steps(run.total)
    if not 1 <= step <= last:
        rule = f"must be one of the training's steps, 1 to {last}"
        raise ConfigError([Problem("step", step, rule, f"Nearest: {min(max(step, 1), last)}.")])
    consumed = schedule.consumed(step - 1)
    micro, size = run.config.batch.micro_batch_size, schedule.at(consumed)
    tracer = _Tracer(run.samples)
    found = [
        tracer.sample(k, step, rank, number)
        for rank in range(run.ranks)
        for number, indices in enumerate(
            batch_indices(consumed, size, micro, rank, run.ranks).tolist()
        )
        for k in indices
    ]
    return with_origins(found, verify_corpus=verify_corpus)


def trace_samples(
    samples: SampleDataset, numbers: Sequence[int], *, verify_corpus: bool = True
) -> Trace:
    """Samples of a dataset outside of any training: of step, rank and micro-batch 0."""
    tracer = _Tracer(samples)
    found = [tracer.sample(k, 0, 0, 0) for k in numbers]
    return with_origins(found, verify_corpus=verify_corpus)


class _Tracer:
    """Opens every dataset once."""

    def __init__(self, samples: SampleDataset) -> None:
        self._samples = samples
        self._opened: dict[str, TokenSource] = {}

    def sample(self, k: int, step: int, rank: int, micro_batch: int) -> TracedSample:
        name = self._samples.source_of(k)
        return TracedSample(step, rank, micro_batch, k, name, tuple(self._parts(k, name)))

    def _parts(self, k: int, name: str) -> list[TracedPart]:
        pieces, own = self._samples.documents_of(k), origins_of(self._samples, k)
        if own:
            if not pieces:
                return [TracedPart(None, origin) for origin in own]
            return [TracedPart(_whole(p), o) for p, o in zip(pieces, own, strict=True)]
        if name == MOCK:
            return [TracedPart(_whole(piece), None) for piece in pieces]
        if name not in self._opened:
            self._opened[name] = IndexedDataset(name)
        return [TracedPart(p, None) for p in document_parts(self._opened[name], pieces)]


def _whole(piece: Piece) -> DocumentPart:
    end = piece.offset + piece.length
    return DocumentPart(piece.sequence, piece.offset, end, end)


def with_origins(samples: Sequence[TracedSample], *, verify_corpus: bool = True) -> Trace:
    """The records of the corpora behind all samples, each corpus read once."""
    wanted: dict[str, set[int]] = {}
    for sample in samples:
        lacking = (p.part.document for p in sample.parts if p.part and p.origin is None)
        wanted.setdefault(sample.dataset, set()).update(lacking)
    origins: dict[str, Mapping[int, Origin]] = {}
    unknown: dict[str, str] = {}
    for name, documents in wanted.items():
        if not documents:
            continue
        if name == MOCK:
            unknown[name] = "its documents are generated"
            continue
        found = find_origins(open_dataset(name), documents, verify_digest=verify_corpus)
        origins[name] = found.found
        if found.unknown:
            unknown[name] = found.unknown
    return Trace(tuple(_filled(s, origins.get(s.dataset, {})) for s in samples), unknown)


def _filled(sample: TracedSample, origins: Mapping[int, Origin]) -> TracedSample:
    parts = [
        replace(p, origin=origins.get(p.part.document)) if p.part and p.origin is None else p
        for p in sample.parts
    ]
    return replace(sample, parts=tuple(parts))
