"""A stepper for one rank, from the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mtk.config.heads import TASKS
from mtk.config.layout_rules import stacked_layers
from mtk.config.model import ModelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.models.init import initial_value
from mtk.parallel.apply import Placed, Values, fill, place
from mtk.parallel.pipeline import (
    Call,
    Pipeline,
    call_bert,
    call_gpt,
    call_gpt_losses,
    call_t5,
    states_boundary,
)
from mtk.parallel.ranks import Ranks
from mtk.parallel.rng import own_heads_dropout
from mtk.parallel.vocabulary import vocab_parallel_losses
from mtk.precision.float8_history import History
from mtk.precision.float8_layers import use_float8
from mtk.precision.loss_scale import LossScale
from mtk.precision.main_weights import COMPUTE_DTYPES, MainWeights
from mtk.training.attention_choice import attention_kernel
from mtk.training.compiled import compiles
from mtk.training.feed import Feed
from mtk.training.loss import token_losses
from mtk.training.objective import (
    Classification,
    MaskedTokens,
    NextToken,
    Objective,
    OfTokens,
    TokenLosses,
)
from mtk.training.optimizer import Optimizer
from mtk.training.passes import Accumulation, Overlap, Passes, Pipelined
from mtk.training.schedule import Schedule
from mtk.training.step import Stepper

MakeObjective = Callable[[TokenLosses], Objective]
# Logits of a micro-batch that take more bytes than this are made in chunks.
LOGITS_BYTES = 16 << 30
# Threads at most that draw initial weights; each may hold the largest matrix in fp32.
INITIAL_WORKERS = 8
# How a module of each family is called.
CALLS: Mapping[str, Call] = {"gpt": call_gpt, "bert": call_bert, "t5": call_t5}


def make_stepper(
    config: PretrainConfig,
    samples: int,
    ranks: Ranks,
    values: Values | None = None,
    *,
    objective: MakeObjective | None = None,
    forward: Call | None = None,
) -> Stepper:
    """Model, optimizer and schedule of this rank.

    samples: of the whole run, for the schedule. values: of the weights (default: initial ones
    of the seed). objective, forward: in place of the family's. Raises LayoutError.
    """
    dtype = COMPUTE_DTYPES[config.precision.precision]
    attention = attention_kernel(config, ranks)
    kernel = attention.kernel
    # Only where masks are drawn: it hides the kernel from the compiler and from recomputation.
    copies = ranks.tp.size > 1 and not config.parallel.sequence_parallel
    if copies and config.model.attention_dropout:
        kernel = own_heads_dropout(kernel, ranks.tp)
    convert = None
    if config.precision.fp8:
        convert = partial(use_float8, options=config.precision, device=ranks.device)
    runtime = dataclasses.replace(config.runtime, compile=compiles(config, ranks.device))
    placed = place(config.model, config.parallel, runtime, ranks, kernel, dtype, convert)
    if values is None:
        initial = partial(_initial, config.model, config.runtime.seed)
        fill(placed, initial, ranks.device, workers=min(INITIAL_WORKERS, torch.get_num_threads()))
    else:
        fill(placed, values, ranks.device)
    main = MainWeights(placed.named_parameters(), dtype)
    placed.cast_copies(dtype)
    return Stepper(
        make_passes(config, placed, ranks, objective, forward),
        main,
        Optimizer(main, config.optimizer),
        Schedule.from_config(config, samples),
        LossScale.start(config.precision),
        ranks,
        placed,
        config.parallel.sequence_parallel,
        attention,
        _history(config, placed, ranks),
    )


def _history(config: PretrainConfig, placed: Placed, ranks: Ranks) -> History | None:
    """Scales of the steps to come, where they are delayed."""
    options = config.precision
    if not options.fp8 or options.fp8_recipe != "delayed":
        return None
    return History(placed.parts, options, ranks.device, (ranks.tp, ranks.shards))


def _initial(model: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return initial_value(name, shape, model, seed)


def make_passes(
    config: PretrainConfig,
    placed: Placed,
    ranks: Ranks,
    objective: MakeObjective | None = None,
    forward: Call | None = None,
) -> Passes:
    """How this rank runs its part of the model. objective, forward: in place of the family's."""
    parallel = config.parallel
    overlap = Overlap(parallel.overlap_param_gather, parallel.overlap_grad_reduce)
    feed, call = Feed(ranks), forward or CALLS[config.model.family]
    minimised = objective_of(config.model, ranks)
    if objective is None and forward is None and fuses_loss(config, placed, ranks):
        call = call_gpt_losses
        minimised = NextToken(partial(_given, otherwise=cross_entropy(config.model, ranks)))
        placed.parts[-1].head.chunk = loss_chunk(config)
    if objective is not None:
        minimised = objective(cross_entropy(config.model, ranks))
        minimised = OfTokens(minimised) if ranks.cp.size > 1 else minimised
    if placed.stages is None:
        each = parallel.data_parallel_sharding == "full" or parallel.shard_accumulated_gradients
        # Without FSDP there are no shards that could add up in fp32.
        each = each and ranks.shards.size > 1
        return Accumulation(placed.parts[0], minimised, feed, overlap, reduce_each=each, call=call)
    rows = ranks.tp.size if parallel.sequence_parallel else 1
    dtype = COMPUTE_DTYPES[config.precision.precision]
    pipeline = Pipeline(
        placed.parts,
        placed.stages.ranks,
        ranks.pp,
        parallel.schedule(stacked_layers(config.model)),
        states_boundary(
            config.model.hidden_size,
            dtype,
            sequence_ranks=rows,
            stacks=2 if config.model.family == "t5" else 1,
        ),
        device=ranks.device,
        deferred=placed.deferred,
        reshard=parallel.data_parallel_sharding == "full",
        overlap=overlap.reduce,
        call=call,
    )
    return Pipelined(pipeline, minimised, feed, overlap)


def _given(outputs: Tensor, labels_BS: Tensor, otherwise: TokenLosses) -> Tensor:
    """Losses [B, S] that the model has computed itself, as it does in training; else those of
    its logits."""
    return outputs if outputs.ndim == labels_BS.ndim else otherwise(outputs, labels_BS)


def fuses_loss(config: PretrainConfig, placed: Placed, ranks: Ranks) -> bool:
    """Whether the loss is taken together with the output matrix: on CUDA, or where chunks are
    asked for, by decoders whose weight gradients are not delayed."""
    model, wanted = config.model, config.runtime.loss_chunk_tokens is not None
    possible = model.family == "gpt" and not placed.deferred
    return possible and (wanted or ranks.device.type == "cuda")


def loss_chunk(config: PretrainConfig) -> int | None:
    """Tokens whose logits are held at a time, None for all of a micro-batch."""
    if config.runtime.loss_chunk_tokens is not None:
        return config.runtime.loss_chunk_tokens
    model, tokens = config.model, config.batch.micro_batch_size * config.model.seq_length
    bytes_each = 2 * model.padded_vocab_size
    return None if tokens * bytes_each <= LOGITS_BYTES else max(1, LOGITS_BYTES // bytes_each)


def objective_of(model: ModelConfig, ranks: Ranks) -> Objective:
    """What a family, or the head of a task, minimises."""
    if model.task_head is not None:
        return Classification(TASKS[model.task_head].choices)
    losses = cross_entropy(model, ranks)
    if model.family == "bert":
        return MaskedTokens(losses, model.bert_binary_head)
    return NextToken(losses)


def cross_entropy(model: ModelConfig, ranks: Ranks) -> TokenLosses:
    """From whole logits, or from this rank's part of the vocabulary."""
    if ranks.tp.size == 1:
        return token_losses
    size = model.padded_vocab_size
    return partial(vocab_parallel_losses, group=ranks.tp, padded_vocab_size=size)
