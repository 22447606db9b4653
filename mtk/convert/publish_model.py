"""Conversions as a whole: write into a staging folder, prove it, only then publish."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mtk.checkpoint import read_model_config
from mtk.checkpoint.save import CheckpointContent, write_content
from mtk.config.model import ModelConfig
from mtk.convert.adapters import apart, has_adapters
from mtk.convert.families import family_for
from mtk.convert.family import Family
from mtk.convert.hf_directory import (
    START,
    read_hf_model,
    read_weights,
    write_hf_directory,
    write_json,
)
from mtk.convert.lazy import LazyTensors, Tensors, as_dtype
from mtk.convert.megatron.comparable import MegatronFiles
from mtk.convert.megatron.open_checkpoint import Given, open_megatron
from mtk.convert.open_model import assemble, has_tokenizer, read_native, tokenizer_folder
from mtk.convert.parity import Parity, compare, fixed_prompts, past_the_window, require
from mtk.convert.probe import PROBES
from mtk.convert.reference_models import (
    Comparable,
    NativeModel,
    PlainModel,
    TransformersModel,
    rounded,
    transformers_installed,
)
from mtk.convert.source import Source
from mtk.errors import ConfigError, ConversionError, Problem
from mtk.tokenizers import Tokenizer, load_tokenizer

ReferenceChoice = Literal["auto", "transformers", "plain"]


@dataclass(frozen=True)
class Demands:
    """What a conversion has to honour. dtype: None keeps the stored one. given: of a Megatron
    checkpoint's arguments. family: to write; None for the first that can express the model."""

    dtype: torch.dtype | None
    tolerance: float
    reference: ReferenceChoice
    max_shard_size: int
    given: Given = field(default_factory=Given)
    family: str | None = None


def write_hf(source: Source, folder: Path, demands: Demands) -> Parity:
    """Any checkpoint -> Hugging Face directory with ``parity.json``.

    Raises ConversionError if no family holds the model, GateError if the written
    directory (or what was read) computes something else.
    """
    config, tensors = read_model(source, demands)
    read = certify_source(source, config, tensors, demands)
    family = family_for(config, demands.family)
    foreign = family.weights(config).as_foreign(as_dtype(tensors, demands.dtype))
    tokenizer = source_tokenizer(source, config)
    write_hf_directory(
        folder,
        family.to_config(config),
        foreign,
        tokens={**token_ids(tokenizer), START: tokenizer.decoder_start if tokenizer else None},
        max_shard_size=demands.max_shard_size,
    )
    if tokenizer is not None:
        tokenizer.save(folder)
    parity = certify(config, tensors, source.folder, reference_model(folder, demands), demands)
    _check_round_trip(config, family, as_dtype(tensors, demands.dtype), folder)
    certificate = {**parity.to_dict(), "round_trip_bit_equal": True}
    write_json(folder / "parity.json", certificate | read)
    return parity


def write_native(source: Source, folder: Path, stage_config: Any, demands: Demands) -> Parity:
    """A foreign directory, or adapters -> native checkpoint of all weights with
    ``parity.json``."""
    config, tensors = read_model(source, demands)
    tokenizer = source_tokenizer(source, config)
    weights = as_dtype(tensors, demands.dtype)
    content = CheckpointContent(config, weights, training={"source": "convert"})
    write_content(folder, content, stage_config, demands.max_shard_size)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    written = Source("native", folder, None)
    reference = source_reference(source, demands)
    parity = certify(
        read_model_config(folder), written.native_tensors(), folder, reference, demands
    )
    write_json(folder / "parity.json", parity.to_dict())
    return parity


def read_model(source: Source, demands: Demands) -> tuple[ModelConfig, Tensors]:
    """As ``read_native``, for a Megatron checkpoint too."""
    if source.kind != "megatron":
        return read_native(source)
    found = open_megatron(source.folder, demands.given)
    return found.config, found.native


def certify_source(
    source: Source, config: ModelConfig, native: Tensors, demands: Demands
) -> dict[str, Any]:
    """For the certificate: that a foreign source was read right, or that adapters were merged
    right. Raises GateError."""
    if has_adapters(source.folder):
        whole = dataclasses.replace(demands, dtype=None)
        reference = source_reference(source, whole)
        return {"merge": certify(config, native, source.folder, reference, whole).to_dict()}
    if source.kind == "native":
        return {}
    reference = source_reference(source, demands)
    return {"source": certify(config, native, source.folder, reference, demands).to_dict()}


def certify(
    config: ModelConfig,
    native: Tensors,
    native_folder: Path,
    reference: Comparable,
    demands: Demands,
) -> Parity:
    """Compare a native model with files run by other code. Raises GateError."""
    rounded_native = LazyTensors(native, lambda name: rounded(name, native[name], demands.dtype))
    probe = PROBES[config.family]
    candidate = NativeModel(assemble(config, rounded_native, native_folder), probe)
    stored = str(demands.dtype).removeprefix("torch.") if demands.dtype else "as stored"
    vocab, positions = config.vocab_size or 1, config.positions
    parity = compare(
        candidate,
        reference,
        fixed_prompts(vocab, positions),
        tolerance=demands.tolerance,
        stored_dtype=stored,
        longer=past_the_window(vocab, positions, config.window_size),
    )
    require(parity)
    return parity


def source_reference(source: Source, demands: Demands) -> Comparable:
    """What runs a foreign source without the tables it is converted by, or adapters beside the
    model that they were trained with."""
    if has_adapters(source.folder):
        config, tensors = apart(source, read_native)
        model = assemble(config, tensors, source.folder)
        return NativeModel(model, PROBES[config.family], "mtk with its adapters apart")
    if source.kind == "megatron":
        return MegatronFiles(open_megatron(source.folder, demands.given), demands.dtype)
    return reference_model(source.folder, demands)


def check_reference(choice: ReferenceChoice) -> None:
    """Before anything is written. Raises ConfigError for a reference that is not there."""
    if choice == "transformers" and not transformers_installed():
        rule = "transformers is not installed"
        fix = "Install the extra hf, or use --reference plain."
        raise ConfigError([Problem("reference", "transformers", rule, fix)])


def reference_model(folder: Path, demands: Demands) -> Comparable:
    """The independent implementation that runs a Hugging Face directory."""
    if demands.reference == "plain" or not transformers_installed():
        found = read_hf_model(folder)
        return PlainModel(found.foreign_config, found.tensors, demands.dtype)
    return TransformersModel(folder, demands.dtype)


def source_tokenizer(source: Source, config: ModelConfig) -> Tokenizer | None:
    """The model's tokenizer; None if it has none. Raises ConversionError if it does not fit."""
    folder = tokenizer_folder(source.kind, source.folder)
    if not has_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > (config.vocab_size or 0):
        raise ConversionError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{config.vocab_size}."
        )
    return tokenizer


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Special tokens for ``config.json``. Padding is EOD: generation needs some id for it."""
    if tokenizer is None:
        return {}
    end = tokenizer.eos if tokenizer.eos is not None else tokenizer.eod
    pad = tokenizer.pad if tokenizer.pad is not None else end
    return {"bos_token_id": tokenizer.bos, "eos_token_id": end, "pad_token_id": pad}


def _check_round_trip(config: ModelConfig, family: Family, tensors: Tensors, folder: Path) -> None:
    """The written files give back every native weight bit for bit, but for padding rows."""
    vocab = config.vocab_size or 0
    back = family.weights(config).as_native(read_weights(folder))
    for name in tensors:
        before, after = tensors[name], back[name]
        if name in ("embedding.tokens.weight", "output.weight", "output_bias"):
            before, after = before[:vocab], after[:vocab]
        if before.dtype != after.dtype or not torch.equal(before, after):
            raise ConversionError(f"{folder}: {name} did not survive the way there and back.")
