"""A conversion to Megatron's format as a whole: written, read back, proven."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mtk.config.model import ModelConfig
from mtk.convert.hf_directory import write_json
from mtk.convert.lazy import Tensors, as_dtype
from mtk.convert.megatron.comparable import MegatronFiles
from mtk.convert.megatron.directory import RELEASE, iteration_folder
from mtk.convert.megatron.open_checkpoint import MegatronModel, open_megatron
from mtk.convert.megatron.ranks import Sizes, open_ranks
from mtk.convert.megatron.writing import Implementation, write_ranks, write_tracker
from mtk.convert.parity import Parity
from mtk.convert.publish_model import (
    Demands,
    certify,
    certify_source,
    read_model,
    source_tokenizer,
)
from mtk.convert.source import Source
from mtk.errors import ConversionError


@dataclass(frozen=True)
class Target:
    """The layout to write for; None: the source's if it is Megatron's, else 1."""

    tensor: int | None
    pipeline: int | None
    implementation: Implementation


def publish_megatron(source: Source, folder: Path, demands: Demands, target: Target) -> Parity:
    """Any checkpoint -> Megatron ``torch`` checkpoint with ``parity.json``; the tracker last.

    Raises ConversionError for a model that is none of Megatron's, ConfigError for sizes that
    do not divide it, GateError if the files (or what was read) compute something else.
    """
    config, tensors = read_model(source, demands)
    read = certify_source(source, config, tensors, demands)
    tokenizer = source_tokenizer(source, config)
    before = _sizes(source, demands)
    weights = as_dtype(tensors, demands.dtype)
    write_ranks(
        folder,
        config,
        weights,
        tensor=target.tensor or before.tensor,
        pipeline=target.pipeline or before.pipeline,
        implementation=target.implementation,
    )
    if tokenizer is not None:
        tokenizer.save(folder)
    written = open_megatron(folder / RELEASE)
    reference = MegatronFiles(written, demands.dtype)
    parity = certify(config, tensors, source.folder, reference, demands)
    _check_round_trip(config, weights, written)
    certificate = {**parity.to_dict(), "round_trip_bit_equal": True}
    write_json(folder / "parity.json", certificate | read)
    write_tracker(folder)
    return parity


def _sizes(source: Source, demands: Demands) -> Sizes:
    if source.kind != "megatron":
        return Sizes()
    return open_ranks(iteration_folder(source.folder), demands.given.args).sizes


def _check_round_trip(config: ModelConfig, before: Tensors, written: MegatronModel) -> None:
    """The files give back every native weight bit for bit, but for padding rows."""
    after = written.native
    for name in before:
        ours, theirs = before[name], after[name]
        if name in ("embedding.tokens.weight", "output.weight", "output_bias"):
            ours, theirs = ours[: config.vocab_size], theirs[: config.vocab_size]
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            folder = written.ranks.folder
            raise ConversionError(f"{folder}: {name} did not survive the way there and back.")
