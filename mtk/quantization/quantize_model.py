"""Quantise a whole model into a staging folder, streaming weight by weight."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtk.config.model import ModelConfig
from mtk.convert.families import family_for
from mtk.convert.family import Family
from mtk.convert.hf_directory import (
    CONFIG,
    read_hf_config,
    read_hf_model,
    write_json,
    write_weights,
)
from mtk.convert.lazy import Tensors, as_dtype
from mtk.convert.mapping import check_complete
from mtk.convert.open_model import OpenedModel, open_source, read_native
from mtk.convert.parity import Parity, compare, fixed_prompts
from mtk.convert.parity import require as require_parity
from mtk.convert.publish_model import source_tokenizer, token_ids
from mtk.convert.reference_models import NativeModel, PlainModel
from mtk.convert.source import Source
from mtk.errors import ConversionError, GateError
from mtk.quantization.dialect import Dialect
from mtk.quantization.directory import dequantized, quantized, write_quant_file
from mtk.quantization.formats import Format

# What travels with a Hugging Face directory besides weights and config.json.
COMPANIONS = (
    "generation_config.json",
    "mtk_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Original:
    """A model to quantise, in Hugging Face form. foreign_config: its ``config.json``."""

    source: Source
    config: ModelConfig
    family: Family
    foreign_config: Mapping[str, Any]
    tensors: Tensors


def read_original(source: Source, dtype: torch.dtype | None) -> Original:
    """Raises ConversionError for a model that the dialects' consumers could not load."""
    if source.kind == "quantized":
        raise ConversionError(f"{source.folder} is quantised already; quantise its original.")
    if source.kind == "hf":
        found = read_hf_model(source.folder)
        original = Original(source, found.config, found.family, found.foreign_config, found.tensors)
    else:
        config, native = read_native(source)
        family = family_for(config)
        foreign = {**family.to_config(config), **token_ids(source_tokenizer(source, config))}
        tensors = family.weights(config).as_foreign(native)
        original = Original(source, config, family, foreign, tensors)
    if original.config.num_experts is not None:
        raise ConversionError(
            f"{source.folder} is a {original.family.architecture}: this version does not quantise "
            f"experts, which hold most of its weights."
        )
    if not original.family.linears:
        raise ConversionError(
            f"{source.folder} is a {original.family.architecture}, whose matrices are Conv1D "
            f"modules stored [in, out]: neither dialect's consumers quantise those. Llama-like "
            f"models can be quantised."
        )
    return Original(
        source,
        original.config,
        original.family,
        original.foreign_config,
        as_dtype(original.tensors, dtype),
    )


def write_quantized(
    original: Original, folder: Path, dialect: Dialect, format_: Format, max_shard_size: int
) -> None:
    """Weights, both configurations and the tokenizer of one dialect."""
    folder.mkdir(parents=True, exist_ok=True)
    view = quantized(original.tensors, original.family.linears, dialect, format_)
    dtype = write_weights(folder, view, max_shard_size)
    ignore = ("lm_head", "model.embed_tokens")
    kept = {k: v for k, v in original.foreign_config.items() if k not in ("torch_dtype", "dtype")}
    content = {**kept, "dtype": dtype, "quantization_config": dialect.config(ignore)}
    write_json(folder / CONFIG, content)
    write_quant_file(folder, dialect, ignore)
    _write_companions(original, folder)


def _write_companions(original: Original, folder: Path) -> None:
    source = original.source
    if source.kind == "hf":
        for name in COMPANIONS:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
        return
    tokenizer = source_tokenizer(source, original.config)
    known = {k: v for k, v in token_ids(tokenizer).items() if v is not None}
    write_json(folder / "generation_config.json", known)
    if tokenizer is not None:
        tokenizer.save(folder)


def open_written(folder: Path) -> OpenedModel:
    """The model as a reader of the written files gets it."""
    return open_source(Source("quantized", folder, None))


def check_rounding(original: Original, folder: Path, format_: Format) -> float:
    """Every written weight is its original, rounded by at most half a level.

    What is not quantised must be unchanged. A perplexity cannot tell a wrong scale on a
    model that is bad already; this can. Returns the largest relative Frobenius error.
    Raises GateError.
    """
    written, worst = dequantized(folder), 0.0
    check_complete(written, original.tensors, f"directory {folder}")
    for name in original.tensors:
        before, after = original.tensors[name].float(), written[name].float()
        error = (after - before).abs()
        allowed = torch.zeros(())
        if name.removesuffix(".weight").endswith(original.family.linears) and before.ndim == 2:
            allowed = format_.bound(before)
            worst = max(worst, (error.norm() / before.norm().clamp(min=1e-30)).item())
        if not bool((error <= allowed).all()):
            raise GateError(
                f"{name} in the written files is not its original rounded to "
                f"{format_.kind.upper()}: off by "
                f"{error.max():.3g}. Nothing was published."
            )
    return worst


def certify(opened: OpenedModel, format_: Format) -> Parity:
    """The opened model equals a plain forward over the written files. Raises GateError."""
    reference = PlainModel(read_hf_config(opened.folder), dequantized(opened.folder))
    prompts = fixed_prompts(opened.config.vocab_size or 1, opened.config.positions)
    parity = compare(
        NativeModel(opened.model),
        reference,
        prompts,
        tolerance=TOLERANCE,
        stored_dtype=format_.kind,
    )
    require_parity(parity)
    return parity
