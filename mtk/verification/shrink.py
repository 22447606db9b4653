"""A configuration made small without losing what its layout depends on. Knows no torch.

Kept: the layout, the kinds of all parts, attention heads, key/value groups, experts and how
many of them a token goes to, heads and groups of Mamba layers, uneven pipeline splits (two
layers at most in a stage, or one of each kind of a pattern), the precision, micro-batches.
Smaller: layers (as few as give each stage its own), channels of a head (8; 16 with FP8) and
with them the hidden size, states, widths of MLPs, the sequence (32 tokens, or the least that
the layout can cut), the vocabulary (uneven, so that its padding counts).
"""

from __future__ import annotations

import dataclasses
from math import lcm
from typing import TypeVar

from mtk.config.float8 import STEP
from mtk.config.layer_pattern import shrunk_pattern
from mtk.config.layout_rules import longest_stage, stacked_layers
from mtk.config.model import ModelConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import BatchConfig, PretrainConfig

HEAD = 8
# All sizes are multiples of it where layers compute in FP8; such layers stay so, however small.
FLOAT8_HEAD = STEP
# Of a model without attention, whose hidden size no heads decide.
LEAST_HIDDEN = 32
STATE = 16
# Several chunks in a sequence.
CHUNK = 8
SEQUENCE = 32
VOCABULARY_UNIT = 32
# Micro-batches of a data-parallel rank, for each pipeline stage.
MICRO_BATCHES = 2
Config = TypeVar("Config", bound=PretrainConfig)


def shrink(config: Config) -> Config:
    """The small configuration; its layout is legal where that of ``config`` is."""
    layers, parallel = _layers(config.model, config.parallel)
    pattern = _pattern(config.model.hybrid_layer_pattern, layers)
    each = layers // _stacks(config.model)
    model = dataclasses.replace(config.model, num_layers=each, hybrid_layer_pattern=pattern)
    precision = config.precision
    model = _sizes(model, parallel, FLOAT8_HEAD if precision.fp8 else HEAD)
    if precision.fp8:
        precision = dataclasses.replace(precision, fp8_min_size=min(precision.fp8_min_size, STEP))
    return dataclasses.replace(
        config,
        model=model,
        parallel=parallel,
        precision=precision,
        batch=_batch(config, parallel),
    )


def _stacks(model: ModelConfig) -> int:
    """An encoder and a decoder have equally many layers."""
    return 2 if model.family == "t5" else 1


def _layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ParallelConfig]:
    """Number of layers of all stacks, and the layout's options that count them."""
    layers, stages = stacked_layers(model), parallel.pipeline_model_parallel_size
    # Room for each kind of a pattern.
    least = max(2, len(set(model.hybrid_layer_pattern or "")))
    if parallel.pipeline_split is not None and stages > 1:
        split = tuple(min(count, least) for count in parallel.pipeline_split)
        if sum(split) % _stacks(model):
            longest = max(range(len(split)), key=parallel.pipeline_split.__getitem__)
            split = (*split[:longest], split[longest] + 1, *split[longest + 1 :])
        layers, changes = sum(split), {"pipeline_split": split}
    elif parallel.num_layers_per_virtual_pipeline_stage is not None and stages > 1:
        virtual = min(parallel.stages_per_rank(layers), 2)
        if parallel.stages_per_rank(layers) == 1:
            virtual = 1
        layers = stages * virtual
        changes = {"num_layers_per_virtual_pipeline_stage": 1}  # type: ignore[dict-item]
    else:
        least = _up(max(least, stages * parallel.stages_per_rank(layers)), _stacks(model))
        layers, changes = min(layers, least), {}
    parallel = dataclasses.replace(parallel, **changes)  # type: ignore[arg-type]
    if parallel.recompute_num_layers is not None:
        most = longest_stage(parallel, layers)
        count = min(parallel.recompute_num_layers, most)
        parallel = dataclasses.replace(parallel, recompute_num_layers=count)
    return layers, parallel


def _pattern(pattern: str | None, layers: int) -> str | None:
    """As many layers, of all kinds in turn."""
    if pattern is None:
        return None
    kinds = "".join(dict.fromkeys(pattern))
    return (kinds * -(-layers // len(kinds)))[:layers]


def _sizes(model: ModelConfig, parallel: ParallelConfig, least: int) -> ModelConfig:
    """least: channels of a head, and what widths are multiples of."""
    tp = parallel.tensor_model_parallel_size
    cp = parallel.context_parallel_size
    rows = tp if parallel.sequence_parallel else 1
    head = _head(model, least)
    hidden = _up(model.num_attention_heads * head if model.has_attention else LEAST_HIDDEN, least)
    # Every rank has tokens in steps of what FP8 asks for.
    tokens = least if least == FLOAT8_HEAD else 1
    unit = lcm(cp * rows, 2 * cp if cp > 1 else 1, tokens * cp)
    length = min(model.seq_length, _up(SEQUENCE, unit))
    mamba = model.has_mamba
    vocabulary_unit = lcm(VOCABULARY_UNIT, tp)
    shared = model.moe_shared_expert_intermediate_size
    return dataclasses.replace(
        model,
        kv_channels=head,
        hidden_size=min(model.hidden_size, hidden),
        ffn_hidden_size=min(model.ffn_size, _up(2 * hidden, least * tp)) if model.has_mlp else None,
        moe_ffn_hidden_size=min(model.moe_ffn_size, _up(hidden, 8 * tp))
        if model.num_experts
        else None,
        moe_shared_expert_intermediate_size=min(shared, _up(hidden, 8 * tp)) if shared else None,
        moe_layer_freq=shrunk_pattern(model.moe_layer_freq, model.num_layers),
        seq_length=length,
        max_position_embeddings=length,
        decoder_seq_length=_up(length // 2, rows)
        if model.family == "t5"
        else model.decoder_seq_length,
        # Still hides something.
        window_size=model.window_size and min(model.window_size, max(1, length // 2)),
        mamba_head_dim=min(model.mamba_head_dim, HEAD) if mamba else model.mamba_head_dim,
        mamba_state_dim=min(model.mamba_state_dim, STATE) if mamba else model.mamba_state_dim,
        mamba_chunk_size=min(model.mamba_chunk_size, CHUNK) if mamba else model.mamba_chunk_size,
        make_vocab_size_divisible_by=vocabulary_unit,
        vocab_size=min(model.vocab_size or 3 * vocabulary_unit, 3 * vocabulary_unit - 5),
    )


def _head(model: ModelConfig, least: int) -> int:
    """Channels of a head: few, but with an even number of rotated ones."""
    for size in (least, 2 * least, 4 * least):
        rotated = int(size * model.rotary_percent)
        even = rotated >= 2 and rotated % 2 == 0
        if size < model.head_size and (model.position_embedding_type != "rope" or even):
            return size
    return model.head_size


def _batch(config: PretrainConfig, parallel: ParallelConfig) -> BatchConfig:
    """At most two samples in a micro-batch, and two micro-batches for each stage."""
    micro = min(config.batch.micro_batch_size, 2)
    copies = config.data_parallel_size
    given = config.batch.full // (config.batch.micro_batch_size * copies)
    count = min(max(given, 2), MICRO_BATCHES * parallel.pipeline_model_parallel_size)
    return BatchConfig(micro_batch_size=micro, global_batch_size=micro * copies * count)


def _up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit
