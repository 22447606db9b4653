"""A model on disk as one rank's part of it: matrices cut over tensor-parallel ranks as in training,
logits whole on each."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import RuntimeConfig
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.mapping import check_complete
from mtk.convert.open_model import OpenedModel, read_native
from mtk.convert.source import Source
from mtk.errors import ConfigError, ConversionError
from mtk.models.attention import sdpa_kernel
from mtk.models.buffers import kept_tensors
from mtk.models.gpt import GPT
from mtk.parallel.apply import Placed, place
from mtk.parallel.gathered_head import GatheredHead
from mtk.parallel.ranks import Ranks

# What has a row for each id.
VOCABULARY = ("embedding.tokens.weight", "output.weight", "output_bias")


def open_shared(
    source: Source, ranks: Ranks, *, dtype: torch.dtype, option: str = "tp"
) -> OpenedModel:
    """The part of ``ranks.tp`` of a model, on this rank's device; whole tensors are read one at a
    time. ``model.config`` has the vocabulary padded so that it divides.

    Raises ConfigError, of ``option``, for a model that does not divide, and what
    :func:`mtk.convert.open_model.open_model` raises.
    """
    config, tensors = read_native(source)
    parallel = ParallelConfig(tensor_model_parallel_size=ranks.tp.size)
    config = _padded(config, ranks.tp.size)
    problems = [replace(problem, key=option) for problem in parallel.problems_with(config)]
    if problems:
        raise ConfigError(problems)
    placed = place(config, parallel, RuntimeConfig(), ranks, sdpa_kernel, dtype)
    (model,) = placed.parts
    _fill(placed, model, _with_rows(tensors, config), ranks.device, dtype, source)
    if ranks.tp.size > 1:
        model.head = GatheredHead(cast(int, config.vocab_size), ranks.tp)
    return OpenedModel(model.eval(), config, source.kind, source.folder, source.artifact)


def _padded(config: ModelConfig, ranks: int) -> ModelConfig:
    unit = lcm(config.make_vocab_size_divisible_by, ranks)
    return replace(config, make_vocab_size_divisible_by=unit)


def _with_rows(tensors: Tensors, config: ModelConfig) -> Tensors:
    """With zeros for ids of the padding that the stored vocabulary lacks."""

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if name not in VOCABULARY:
            return tensor
        more = config.padded_vocab_size - tensor.shape[0]
        return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, more)) if more > 0 else tensor

    return LazyTensors(tensors, read)


@torch.no_grad()
def _fill(
    placed: Placed,
    model: GPT,
    tensors: Tensors,
    device: torch.device,
    dtype: torch.dtype,
    source: Source,
) -> None:
    model.to_empty(device=device).to(dtype)
    model.fill_tables(device)
    held = kept_tensors(model)
    check_complete(tensors, held, f"model in {source.folder}")
    for name, own in held.items():
        whole, piece = tensors[name], placed.pieces[name]
        if tuple(whole.shape) != piece.shape:
            raise ConversionError(
                f"{source.folder}: {name} is {list(whole.shape)}, the model needs "
                f"{list(piece.shape)}."
            )
        own.copy_(piece.cut(whole))
