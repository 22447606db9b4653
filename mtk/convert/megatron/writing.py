"""Writing a Megatron ``torch`` checkpoint: one rank's file at a time, the tracker last."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert.lazy import Tensors
from mtk.convert.megatron.argument_writing import (
    dtype_arguments,
    layout_problems,
    unwritable,
    write_arguments,
)
from mtk.convert.megatron.bert import bert_arguments, nested
from mtk.convert.megatron.directory import FILES, RELEASE, TRACKER
from mtk.convert.megatron.rules import megatron_table
from mtk.convert.megatron.weights import ROWS, Weight, weights_of
from mtk.errors import ConfigError, ConversionError

Implementation = Literal["transformer_engine", "local"]
VERSION = 3.0
OUTPUT, WORDS = "output_layer.weight", "embedding.word_embeddings.weight"
# Transformer Engine computes a norm together with the linear layer behind it.
MLP_NORM = "pre_mlp_layernorm."
FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    (MLP_NORM, "mlp.linear_fc1.layer_norm_"),
)


def write_ranks(
    folder: Path,
    config: ModelConfig,
    native: Tensors,
    *,
    tensor: int,
    pipeline: int,
    implementation: Implementation,
) -> None:
    """Write ``release/mp_rank_*/model_optim_rng.pt``: what Megatron loads without an optimizer.

    Raises ConversionError for a model that is none of Megatron's, ConfigError for sizes that
    do not divide it.
    """
    reasons = list(unwritable(config))
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise ConversionError(f"Megatron's format does not hold this model:\n{listed}")
    problems = list(layout_problems(config, tensor, pipeline))
    if problems:
        raise ConfigError(problems)
    rows = padded_rows(config, tensor)
    whole = megatron_table(config, rows).as_foreign(native)
    dtype = next(t.dtype for t in (native[name] for name in native) if t.is_floating_point())
    args = write_arguments(config, rows, tensor, pipeline) | dtype_arguments(dtype)
    args["transformer_impl"] = implementation
    bert = config.family == "bert"
    if bert:
        args |= bert_arguments(config)
        implementation = "local"
    for stage in range(pipeline):
        for rank in range(tensor):
            state = OrderedDict(
                _shard(config, rows, whole, (rank, tensor), (stage, pipeline), implementation)
            )
            content = {
                "args": argparse.Namespace(**args),
                "checkpoint_version": VERSION,
                "iteration": 0,
                "model": nested(state) if bert else state,
            }
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            path = folder / RELEASE / name / FILES[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)


def write_tracker(folder: Path) -> None:
    """What makes the files a checkpoint: Megatron looks for nothing without it."""
    (folder / TRACKER).write_text(RELEASE, encoding="utf-8")


def padded_rows(config: ModelConfig, tensor: int) -> int:
    """Megatron pads the vocabulary to a multiple that grows with the tensor-parallel size."""
    unit = config.make_vocab_size_divisible_by * tensor
    return -(-(config.vocab_size or 0) // unit) * unit


def _shard(
    config: ModelConfig,
    rows: int,
    whole: Tensors,
    tensor: tuple[int, int],
    pipeline: tuple[int, int],
    implementation: Implementation,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one rank. tensor, pipeline: its number and how many there are."""
    stage, stages = pipeline
    per_stage = config.num_layers // stages
    before = stage * per_stage
    first, last = stage == 0, stage == stages - 1
    for weight in weights_of(config, rows):
        own = {"first": first, "last": last}
        place = weight.place
        here = own[place] if isinstance(place, str) else before <= place < before + per_stage
        if here:
            piece = weight.piece(whole[weight.name], *tensor)
            fused = implementation == "transformer_engine"
            yield from _named(weight, before, piece, FUSED if fused else (), config)
    if last and not first and not config.untie_embeddings_and_output_weights:
        # The last stage multiplies with a copy of the tied matrix.
        yield OUTPUT, ROWS.piece(whole[WORDS], *tensor)


def _named(
    weight: Weight,
    before: int,
    piece: Tensor,
    spellings: tuple[tuple[str, str], ...],
    config: ModelConfig,
) -> Iterator[tuple[str, Tensor]]:
    """Under the names of the stage's own layers; of experts a matrix each."""
    if not isinstance(weight.place, int):
        yield weight.part, piece
        return
    layer = f"decoder.layers.{weight.place - before}."
    if weight.of_experts:
        matrix = weight.part.removeprefix("mlp.experts.")
        for index, expert in enumerate(piece):
            yield f"{layer}mlp.experts.local_experts.{index}.{matrix}", expert.clone()
        return
    part = weight.part
    for plain, fused in spellings:
        # Before experts the norm stays a module of its own.
        if part.startswith(plain) and (plain != MLP_NORM or not config.has_experts(weight.place)):
            part = fused + part.removeprefix(plain)
    yield layer + part, piece
