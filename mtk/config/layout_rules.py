"""Rules that tie a layout to the model: each violation with the nearest legal values.

A value that breaks one rule is answered with values that keep all rules of its kind, so
that one correction is enough. No torch, no processes: a layout that breaks a rule is
refused before any rank starts, and ``mtk plan`` refuses the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import TYPE_CHECKING

from mtk.config.mamba import mamba_sizes
from mtk.config.mamba_layout import (
    mamba_context_problems,
    mamba_tensor_problems,
    shares_mamba_groups,
    shares_mamba_heads,
)
from mtk.config.nearest import divisors, multiples, nearest
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig
    from mtk.config.parallel import ParallelConfig


def stacked_layers(model: ModelConfig) -> int:
    """Layers that stages share out: T5 stacks an encoder and a decoder of num_layers."""
    return model.num_layers * (2 if model.family == "t5" else 1)


# -- tensor, sequence ---------------------------------------------------------------------


def shares_heads(tp: int, model: ModelConfig) -> bool:
    return not model.has_attention or model.num_attention_heads % tp == 0


def shares_groups(tp: int, model: ModelConfig) -> bool:
    """Ranks split the key/value heads, or several ranks hold the same one."""
    groups = model.query_groups
    return not model.has_attention or groups % tp == 0 or tp % groups == 0


def shares_ffn(tp: int, model: ModelConfig) -> bool:
    return not model.has_mlp or model.ffn_size % tp == 0


def shares_experts_ffn(tp: int, model: ModelConfig) -> bool:
    """Grouped products read rows of 16 bytes, 8 values in bf16."""
    return tp == 1 or not model.num_experts or model.moe_ffn_size % (8 * tp) == 0


def shares_shared_expert(tp: int, model: ModelConfig) -> bool:
    return (model.moe_shared_expert_intermediate_size or 0) % tp == 0


def shares_vocabulary(tp: int, model: ModelConfig) -> bool:
    """The padded vocabulary divides, whatever tokenizer decides it where it is open."""
    known = model.vocab_size is not None
    return (model.padded_vocab_size if known else model.make_vocab_size_divisible_by) % tp == 0


TP_RULES = (
    shares_heads,
    shares_groups,
    shares_ffn,
    shares_experts_ffn,
    shares_shared_expert,
    shares_mamba_heads,
    shares_mamba_groups,
)


def tensor_degrees(model: ModelConfig) -> list[int]:
    """Every legal tensor-parallel size; the vocabulary's padding can follow any of them."""
    heads = model.num_attention_heads if model.has_attention else mamba_sizes(model).heads
    return [tp for tp in range(1, heads + 1) if all(rule(tp, model) for rule in TP_RULES)]


def tensor_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    tp, name = parallel.tensor_model_parallel_size, "parallel.tensor_model_parallel_size"
    legal = tensor_degrees(model)
    fix = nearest(tp, legal)
    heads, groups = model.num_attention_heads, model.query_groups
    yield from mamba_tensor_problems(parallel, model, legal)
    yield from _overlap_problems(parallel, model)
    if tp > heads and model.has_attention:
        yield Problem(name, tp, f"must not exceed model.num_attention_heads = {heads}", fix)
    elif not shares_heads(tp, model):
        yield Problem(name, tp, f"must divide model.num_attention_heads = {heads}", fix)
    if not shares_groups(tp, model):
        rule = f"must divide or be a multiple of model.num_query_groups = {groups}"
        yield Problem(name, tp, rule, fix)
    if not shares_ffn(tp, model):
        rule = f"must divide model.ffn_hidden_size = {model.ffn_size}"
        yield Problem(name, tp, rule, fix)
    if not shares_experts_ffn(tp, model):
        rule = f"must divide the width of an expert's MLP, {model.moe_ffn_size}, in parts of 8"
        yield Problem(name, tp, rule, fix)
    if not shares_shared_expert(tp, model):
        width = model.moe_shared_expert_intermediate_size
        rule = f"must divide model.moe_shared_expert_intermediate_size = {width}"
        yield Problem(name, tp, rule, fix)
    if not shares_vocabulary(tp, model):
        unit = model.make_vocab_size_divisible_by
        known = f" ({model.padded_vocab_size} now)" if model.vocab_size is not None else ""
        rule = f"the padded vocabulary{known} must be a multiple of TP = {tp}"
        fix = nearest(unit, multiples(unit, tp))
        yield Problem("model.make_vocab_size_divisible_by", unit, rule, fix)


def _overlap_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    if not parallel.tp_comm_overlap:
        return
    plain = model.family == "gpt" and not model.has_mamba
    if not plain or model.lora.lora_rank is not None:
        rule = "is written for decoders' attention and MLPs, without adapters"
        yield Problem("parallel.tp_comm_overlap", True, rule, "Leave it out.")


def sequence_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    """Context parallelism cuts each sequence in 2 x CP chunks, sequence parallelism each
    rank's tokens in TP rows."""
    cp, seq = parallel.context_parallel_size, model.seq_length
    rows = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    chunks = 2 * cp if cp > 1 else 1
    fix = nearest(seq, multiples(seq, lcm(cp * rows, chunks)))
    if seq % chunks:
        rule = f"must be a multiple of 2 x context_parallel_size = {chunks}"
        yield Problem("model.seq_length", seq, rule, fix)
    elif seq // cp % rows:
        rule = f"sequence parallelism needs {seq // cp} tokens of each sequence on a rank "
        rule += f"to be a multiple of TP = {rows}"
        yield Problem("model.seq_length", seq, rule, fix)
    if model.family == "t5" and model.decoder_seq_length % rows:
        rule = f"sequence parallelism needs it to be a multiple of TP = {rows}"
        fix = nearest(model.decoder_seq_length, multiples(model.decoder_seq_length, rows))
        yield Problem("model.decoder_seq_length", model.decoder_seq_length, rule, fix)
    if cp > 1 and model.family != "gpt":
        rule = f"cuts sequences that are read from left to right; family is {model.family}"
        yield Problem("parallel.context_parallel_size", cp, rule, "Nearest: 1.")
    yield from mamba_context_problems(parallel, model)
    if not model.has_attention:
        return
    if cp > 1 and parallel.cp_comm_type == "p2p" and model.attention_dropout:
        rule = "cannot be drawn alike in the ring of cp_comm_type = p2p"
        fix = "Use --attention-dropout 0, or --cp-comm-type all_gather (or a2a)."
        yield Problem("model.attention_dropout", model.attention_dropout, rule, fix)
    if cp > 1:
        yield from _scores_over_context(parallel, model)
    if cp > 1 and parallel.cp_comm_type == "a2a":
        yield from _heads_over_context(parallel, model)


def _scores_over_context(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    """What changes scores by position needs a kernel that sees whole sequences."""
    kind, method = model.position_embedding_type, parallel.cp_comm_type
    if model.biases_scores:
        rule = f"position_embedding_type = {kind} biases scores, which no exchange knows yet"
        cp = parallel.context_parallel_size
        yield Problem("parallel.context_parallel_size", cp, rule, "Nearest: 1.")
    elif model.window_size is not None and method != "a2a":
        rule = f"knows no windows (window_size = {model.window_size})"
        yield Problem("parallel.cp_comm_type", method, rule, "Nearest: a2a.")


def _heads_over_context(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    """All-to-all; key/value heads need no rule, as they are replicated where too few."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads = model.num_attention_heads // tp
    if shares_heads(tp, model) and heads % cp:
        rule = f"all-to-all shares the {heads} heads of a rank over CP"
        fix = f"{nearest(cp, divisors(heads))} Or use --cp-comm-type p2p or all_gather."
        yield Problem("parallel.context_parallel_size", cp, rule, fix)


# -- pipeline -----------------------------------------------------------------------------


def pipeline_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    pp, layers = parallel.pipeline_model_parallel_size, stacked_layers(model)
    if pp == 1:
        return
    if parallel.pipeline_split is not None:
        yield from _split_problems(parallel.pipeline_split, layers)
    elif parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield from _virtual_problems(parallel, layers)
    elif pp * parallel.stages_per_rank(layers) > layers:
        each = parallel.stages_per_rank(layers)
        rule = f"makes {pp * each} stages of {layers} layers; each needs at least one"
        fix = nearest(pp, range(1, layers // each + 1))
        yield Problem("parallel.pipeline_model_parallel_size", pp, rule, fix)
    yield from _schedule_problems(parallel, layers)


def _split_problems(split: tuple[int, ...], layers: int) -> Iterator[Problem]:
    if min(split, default=1) >= 1 and sum(split) != layers:
        rule = f"must add up to the model's {layers} layers, not {sum(split)}"
        fix = ""
        if len(split) <= layers:
            base, more = divmod(layers, len(split))
            balanced = tuple(base + (index < more) for index in range(len(split)))
            fix = f"For example {' '.join(map(str, balanced))}."
        yield Problem("parallel.pipeline_split", split, rule, fix)


def _virtual_problems(parallel: ParallelConfig, layers: int) -> Iterator[Problem]:
    pp, chunk = (
        parallel.pipeline_model_parallel_size,
        parallel.num_layers_per_virtual_pipeline_stage,
    )
    assert chunk is not None
    if layers == pp * chunk:
        rule = f"makes one stage a rank of {layers} layers, which is no virtual stage"
        fix = nearest(chunk, virtual_chunks(parallel, layers))
        yield Problem("parallel.num_layers_per_virtual_pipeline_stage", chunk, rule, fix)
    if layers % (pp * chunk) == 0:
        return
    if layers < pp:
        rule = f"makes {pp} stages of {layers} layers; each needs at least one"
        fix = nearest(pp, range(1, layers + 1))
        yield Problem("parallel.pipeline_model_parallel_size", pp, rule, fix)
        return
    rule = f"x pipeline_model_parallel_size = {pp} must divide the model's {layers} layers"
    fix = nearest(chunk, virtual_chunks(parallel, layers))
    fix = f"{fix} Or give the layers of each virtual stage with --pipeline-split.".strip()
    yield Problem("parallel.num_layers_per_virtual_pipeline_stage", chunk, rule, fix)


def virtual_chunks(parallel: ParallelConfig, layers: int) -> list[int]:
    """Legal layers per virtual stage that make at least two of them a rank."""
    per_rank, rest = divmod(layers, parallel.pipeline_model_parallel_size)
    return [] if rest else divisors(per_rank)[:-1]


def _schedule_problems(parallel: ParallelConfig, layers: int) -> Iterator[Problem]:
    each, schedule = parallel.stages_per_rank(layers), parallel.pipeline_schedule
    name = "parallel.pipeline_schedule"
    if schedule == "interleaved" and each < 2:
        rule = f"runs at least 2 stages a rank; this layout has {each}"
        yield Problem(name, schedule, rule, "Nearest: 1f1b.")
    if schedule == "1f1b" and each > 1:
        rule = f"runs one stage a rank; this layout has {each}"
        yield Problem(name, schedule, rule, "Nearest: interleaved.")
    if schedule == "zbv" and each != 2:
        rule = f"runs exactly 2 stages a rank; this layout has {each}"
        yield Problem(name, schedule, rule, "Leave out the virtual stages: zbv makes two.")


# -- experts, recomputation ---------------------------------------------------------------


def expert_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    ep, name = parallel.expert_model_parallel_size, "parallel.expert_model_parallel_size"
    if ep == 1:
        return
    if not model.num_experts:
        yield Problem(name, ep, "the model has no experts to share", "Nearest: 1.")
    elif model.num_experts % ep:
        rule = f"must divide model.num_experts = {model.num_experts}"
        yield Problem(name, ep, rule, nearest(ep, divisors(model.num_experts)))


def recompute_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    count, layers = parallel.recompute_num_layers, stacked_layers(model)
    if count is None or parallel.recompute_method is None:
        return
    most = longest_stage(parallel, layers)
    if count > most:
        rule = f"exceeds the {most} layers of the longest stage"
        yield Problem("parallel.recompute_num_layers", count, rule, f"Nearest: {most}.")


def longest_stage(parallel: ParallelConfig, layers: int) -> int:
    """Layers of the longest (virtual) stage: the given one, else an even share rounded up."""
    if parallel.pipeline_split:
        return max(parallel.pipeline_split)
    stages = parallel.pipeline_model_parallel_size * parallel.stages_per_rank(layers)
    return -(-layers // stages)
