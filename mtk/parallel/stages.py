"""Pipeline stages: which layers each has, where it runs, and the modules of this rank.

A rank may hold several (virtual) stages. In a loop stage ``s`` runs on rank ``s % pp``; in
the V of zbv the second half comes back in reverse, so that the first and the last stage
share rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

from mtk.config.layout_rules import stacked_layers
from mtk.config.model import ModelConfig
from mtk.config.parallel import ParallelConfig
from mtk.models.attention import AttentionKernel, sdpa_kernel
from mtk.models.build import build_on_meta
from mtk.models.count_families import layer_costs, output_cost
from mtk.models.gpt import GPT
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks

# The look-up does no FLOPs worth counting, but moves each state and its gradient through
# memory (about 12 bytes an element): at some 200 FLOPs a byte that is this many an element.
LOOKUP_FLOPS = 2400
# Likewise each logit is written, widened to fp32, and read and written again by softmax and its
# backward: some 30 bytes.
LOGIT_FLOPS = 6000
TIED = "embedding.tokens.weight"
# Tables that all layers of a stack add to their scores: every stage has a copy.
SHARED_BIASES = ("relative_bias", "encoder_bias", "decoder_bias")
# What several stages may hold under one name.
SHARED = (TIED, *(f"{name}.weight" for name in SHARED_BIASES))


@dataclass(frozen=True)
class Stages:
    """Where the layers are. layers: of each stage, first to last. ranks: of each stage, its
    place in the pipeline group."""

    layers: tuple[range, ...]
    ranks: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.layers)

    def of(self, rank: int) -> tuple[int, ...]:
        """The stages on a rank, in order."""
        return tuple(stage for stage, place in enumerate(self.ranks) if place == rank)


def plan_stages(config: ModelConfig, parallel: ParallelConfig) -> Stages:
    """Cut the layers as ``pipeline_split`` says, else by cost; the rules of
    ``ParallelConfig`` must hold."""
    ranks = parallel.pipeline_model_parallel_size
    layers = stacked_layers(config)
    count = ranks * parallel.stages_per_rank(layers)
    split = parallel.pipeline_split
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    if split is None and chunk is not None:
        split = (chunk,) * count
    if split is None:
        split = balance(config, count)
    v_shape = parallel.schedule(layers) == "zbv"
    return Stages(ranges(split), placement(ranks, count, v_shape=v_shape))


def placement(ranks: int, stages: int, *, v_shape: bool) -> tuple[int, ...]:
    """The rank of each stage."""
    if v_shape:
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(stage % ranks for stage in range(stages))


def ranges(split: Sequence[int]) -> tuple[range, ...]:
    """Numbers of layers per stage -> the layers."""
    starts = [sum(split[:stage]) for stage in range(len(split) + 1)]
    return tuple(range(a, b) for a, b in pairwise(starts))


def balance(config: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers per stage so that the dearest stage is as cheap as can be.

    Costs are FLOPs per token: the output matrix and the loss count with the last stage, the
    look-up with the first. Raises ValueError for more stages than layers.
    """
    if config.task_head is not None:  # neither matrix nor logits at the end
        first = float(LOOKUP_FLOPS * config.hidden_size)
        return partition(layer_costs(config), stages, first=first, last=0.0)
    none = output_cost(config)
    first = float(LOOKUP_FLOPS * config.hidden_size)
    # T5 has logits for the decoder's tokens only.
    share = config.decoder_seq_length / config.seq_length if config.family == "t5" else 1.0
    last = none + LOGIT_FLOPS * config.padded_vocab_size * share
    return partition(layer_costs(config), stages, first=first, last=last)


def partition(costs: Sequence[float], stages: int, *, first: float, last: float) -> tuple[int, ...]:
    """Cut layers of these costs into ``stages`` contiguous parts of at least one.

    first, last: extra cost of the first and the last stage. The highest cost is the lowest
    possible one; among those cuts the one with the most even costs is taken.
    """
    layers = len(costs)
    if stages > layers:
        raise ValueError(f"{layers} layers do not fill {stages} stages")
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, end: int) -> float:
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        return before[end] - before[start] + extra

    def ends(stage: int, start: int) -> range:
        """Where a stage may end, so that each later one has a layer."""
        least = layers if stage == stages - 1 else start + 1
        return range(least, layers - (stages - stage - 1) + 1)

    @cache
    def lowest(stage: int, start: int) -> float:
        """The highest cost among the stages from ``stage`` on, at best."""
        if stage == stages:
            return 0.0
        return min(
            max(cost(stage, start, end), lowest(stage + 1, end)) for end in ends(stage, start)
        )

    limit = lowest(0, 0) * (1 + 1e-12)

    @cache
    def evenest(stage: int, start: int) -> tuple[float, tuple[int, ...]]:
        """The least sum of squared costs with none above the limit, and its cut."""
        if stage == stages:
            return 0.0, ()
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for end in ends(stage, start):
            own = cost(stage, start, end)
            if own > limit:
                break
            squares, rest = evenest(stage + 1, end)
            best = min(best, (squares + own**2, (end - start, *rest)))
        return best

    return evenest(0, 0)[1]


def cut(
    config: ModelConfig, stages: Stages, rank: int, kernel: AttentionKernel = sdpa_kernel
) -> list[GPT]:
    """The stage modules of pipeline rank ``rank``, in order, on the meta device."""
    modules = []
    for stage in stages.of(rank):
        model = build_on_meta(config, kernel)
        first, last = stage == 0, stage == stages.count - 1
        model.keep(stages.layers[stage], first=first, last=last)
        modules.append(model)
    return modules


def mark_tied(
    pieces: Mapping[str, Piece], config: ModelConfig, stages: Stages, ranks: Ranks
) -> dict[str, Piece]:
    """Note in ``pieces`` that first and last stage both hold the tied matrix, and all stages
    the tables of relative positions, and that each has a part of the gradient only. Where
    stages share a rank nothing is to be noted: ``Pipeline`` keeps such copies equal."""
    marked = dict(pieces)
    for name in SHARED[1:]:
        if name in marked:
            piece = marked[name]
            copies = (*piece.copies, ranks.pp)
            marked[name] = replace(piece, copies=copies).with_partial(ranks.pp)
    one_rank = stages.ranks[0] == stages.ranks[-1] or ranks.ends.size == 1
    untied = config.untie_embeddings_and_output_weights or config.task_head is not None
    if untied or one_rank:
        return marked
    piece = marked[TIED]
    marked[TIED] = replace(piece, copies=(*piece.copies, ranks.ends)).with_partial(ranks.ends)
    return marked
