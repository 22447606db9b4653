"""Memory of the fullest rank, by formula: nothing here is measured.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large
Transformer Models", table 2) written term by term, so that other MLP widths, grouped
keys and 4-byte formats fit in; bytes of weights and optimizer follow the ZeRO table of
Megatron's distributed optimizer (18 or 6 + 12/d a parameter in bf16 with fp32
gradients). Not in it: fragmentation, workspaces, NCCL buffers, the CUDA context.
Symbols: s sequence, b micro-batch, h hidden, a heads, t p c d the four degrees. A rank's
place in the pipeline is called its stage, though it may hold several virtual ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from mtk.config.attention_rules import surely_fused
from mtk.config.mamba import ATTENTION, EXPERTS, MAMBA
from mtk.config.model import ModelConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.plan import PlanConfig
from mtk.models.count import expert_weights, instead_of_dense
from mtk.models.count_families import cross_attention, layers_of, parameters
from mtk.parallel.planning_pattern import mamba_activations, pattern_parameters, scan_activations

# Bytes a parameter: (weight, gradient, optimizer with main weights).
BYTES = {"fp32": (4, 4, 8), "bf16": (2, 4, 12), "fp16": (2, 2, 16)}
# A layer of T5's decoder, beside the kinds of a pattern.
DECODER = "decoder"


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage. parameters: how many it holds."""

    stage: int
    parameters: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def fullest_rank(config: PlanConfig) -> RankMemory:
    """The rank with the highest total over all pipeline stages."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    return max((rank_memory(config, stage) for stage in stages), key=lambda rank: rank.total)


def rank_memory(config: PlanConfig, stage: int) -> RankMemory:
    """One rank at place ``stage`` of the pipeline."""
    dense, expert = stage_parameters(config, stage)
    shards = config.data_parallel_size * config.parallel.context_parallel_size
    parts = [
        _state(config, dense, shards),
        _state(config, expert, max(1, shards // config.parallel.expert_model_parallel_size)),
    ]
    weights, gradients, optimizer = (sum(column) for column in zip(*parts, strict=True))
    placed = stages_of(config, stage)
    return RankMemory(
        stage=stage,
        parameters=dense + expert,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=stage_activations(config, stage)
        + (embedding_activations(config) if 0 in placed else 0),
        logits=logits(config) if len(split_of(config)) - 1 in placed else 0,
    )


def _state(config: PlanConfig, held: float, ranks: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer; ``ranks`` hold the same parameters and shard
    them in groups of ranks / instances."""
    weight, gradient, optimizer = BYTES[config.precision.precision]
    sharding = config.parallel.data_parallel_sharding
    shards = max(1, ranks // config.parallel.num_distributed_optimizer_instances)
    everything = shards if sharding == "full" else 1
    return (
        held * weight / everything,
        held * gradient / everything,
        held * optimizer / (1 if sharding == "replicate" else shards),
    )


def split_of(config: PlanConfig) -> tuple[int, ...]:
    """Layers of each (virtual) stage, exactly those that training gives it."""
    return _split(config.model, config.parallel)


@lru_cache(maxsize=8)
def _split(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Every formula asks for it; the cut by cost takes long for many stages."""
    layers = layers_of(model)
    if parallel.pipeline_split is not None:
        return parallel.pipeline_split
    stages = parallel.pipeline_model_parallel_size * parallel.stages_per_rank(layers)
    if stages == 1:
        return (layers,)
    from mtk.parallel.stages import plan_stages  # loads torch, which other plans do without

    return tuple(len(part) for part in plan_stages(model, parallel).layers)


def stages_of(config: PlanConfig, rank: int) -> tuple[int, ...]:
    """The (virtual) stages at a place of the pipeline: a loop, or the V of zbv."""
    parallel = config.parallel
    ranks, stages = parallel.pipeline_model_parallel_size, len(split_of(config))
    if parallel.schedule(layers_of(config.model)) == "zbv":
        return (rank, stages - 1 - rank)
    return tuple(range(rank, stages, ranks))


def stage_parameters(config: PlanConfig, stage: int) -> tuple[float, float]:
    """Parameters a rank of this stage holds, those of experts apart: matrices are shared over
    TP (norms counted so too), experts over EP as well."""
    model, parallel = config.model, config.parallel
    split, placed = split_of(config), stages_of(config, stage)
    table = model.padded_vocab_size * model.hidden_size
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    share = sum(split[index] for index in placed) / sum(split)
    alike = parameters(model) - tables * table - expert_weights(model)
    alike -= model.moe_layers * instead_of_dense(model)
    crossing = cross_attention(model) if model.family == "t5" else 0
    alike -= model.num_layers * crossing
    moe_layers = _moe_layers(config, stage)
    in_experts = expert_weights(model) / max(model.moe_layers, 1) * moe_layers
    held = alike * share + moe_layers * instead_of_dense(model)
    held += crossing * sum(kinds.count(DECODER) for kinds in kinds_of(config, stage))
    if model.hybrid_layer_pattern is not None:
        own = "".join(kind or "" for kinds in kinds_of(config, stage) for kind in kinds)
        layers, in_experts = pattern_parameters(model, own)
        all_layers = sum(pattern_parameters(model, model.hybrid_layer_pattern))
        held = layers + (parameters(model) - tables * table - all_layers) * share
    first, last = 0 in placed, len(split) - 1 in placed
    # A tied output matrix is a second copy where first and last stage differ.
    held += table * (first + last if tables == 2 or not (first and last) else 1)
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    return held / tp, in_experts / tp / ep


def _moe_layers(config: PlanConfig, stage: int) -> int:
    """Layers with experts at a place of the pipeline."""
    starts = [0, *accumulate(split_of(config))]
    own = [range(starts[index], starts[index + 1]) for index in stages_of(config, stage)]
    return sum(config.model.has_experts(layer) for layers in own for layer in layers)


def micro_batches(config: PlanConfig) -> int:
    """Micro-batches of a step on each rank."""
    return config.global_batch_size // (config.batch.micro_batch_size * config.data_parallel_size)


def micro_batches_in_flight(config: PlanConfig, stage: int) -> float:
    """Micro-batches whose activations are alive at once on a rank, at most.

    1F1B and ZB1P fill the pipeline from a rank on (Narayanan et al. 2021, Qi et al. 2023);
    virtual stages add a part of it; zbv holds as much on every rank (Qi et al. 2024).
    """
    parallel, stages = config.parallel, config.parallel.pipeline_model_parallel_size
    if parallel.schedule(layers_of(config.model)) == "zbv":
        return float(min(stages, micro_batches(config)))
    alive = float(min(stages - stage, micro_batches(config)))
    each = len(split_of(config)) // stages
    return alive * (1 + (stages - 1) / (stages * each)) if each > 1 else alive


def layers_in_flight(config: PlanConfig, stage: int) -> float:
    """Layers x micro-batches whose activations are alive at once."""
    split = split_of(config)
    held = sum(split[index] for index in stages_of(config, stage))
    return held * micro_batches_in_flight(config, stage)


def kinds_of(config: PlanConfig, stage: int) -> list[list[str | None]]:
    """The kinds of the layers of each (virtual) stage on a rank; None is attention and MLP."""
    model, split = config.model, split_of(config)
    kinds: list[str | None] = [None] * model.num_layers
    if model.hybrid_layer_pattern is not None:
        kinds = list(model.hybrid_layer_pattern)
    elif model.family == "t5":
        kinds += [DECODER] * model.num_layers
    starts = [0, *accumulate(split)]
    return [kinds[starts[index] : starts[index + 1]] for index in stages_of(config, stage)]


def stage_activations(config: PlanConfig, stage: int) -> float:
    """Bytes of a rank's layers at the peak: what all micro-batches in flight keep, and what is
    being recomputed."""
    parallel, placed = config.parallel, kinds_of(config, stage)
    alive = micro_batches_in_flight(config, stage)
    if parallel.recompute_granularity != "full":
        each = [layer_activations(config, kind) for kinds in placed for kind in kinds]
        return layers_in_flight(config, stage) * sum(each) / len(each)
    unit, states = parallel.recompute_num_layers or 1, layer_input(config)
    whole = {kind: whole_layer_activations(config, kind) for kinds in placed for kind in kinds}
    if parallel.recompute_method == "uniform":
        units = [kinds[k : k + unit] for kinds in placed for k in range(0, len(kinds), unit)]
        return len(units) * states * alive + max(sum(map(whole.__getitem__, u)) for u in units)
    kept = sum(
        min(unit, len(kinds)) * states + sum(whole[kind] for kind in kinds[unit:])
        for kinds in placed
    )
    # A layer that is kept whole is free again when a recomputed one before it needs the room.
    return kept * alive + (max(whole.values()) if unit >= max(map(len, placed)) else 0)


def layer_input(config: PlanConfig) -> float:
    """Bytes of a layer's input, for one micro-batch on one rank."""
    parallel = config.parallel
    parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return _tokens(config) * config.model.hidden_size * _element(config) / parts


def layer_activations(config: PlanConfig, kind: str | None = None) -> float:
    """Bytes that a recomputed layer, or each layer without full recomputation, keeps for
    backward, for one micro-batch on one rank; what is being recomputed not counted. kind: of a
    layer of a pattern; None is attention and MLP."""
    if config.parallel.recompute_granularity == "full":
        return layer_input(config)
    if config.parallel.recompute_granularity is not None:
        return _projections(config, kind)
    return whole_layer_activations(config, kind)


def whole_layer_activations(config: PlanConfig, kind: str | None = None) -> float:
    """Bytes that one layer keeps, or makes anew, without recomputation."""
    core = 0.0
    if kind in (None, ATTENTION, DECODER):
        core = _scores(config, kind) / _tp(config)
    elif kind == MAMBA and config.runtime.mamba_backend == "torch":
        core = _tokens(config) * scan_activations(config.model, _element(config), _tp(config))
    return _projections(config, kind) + core


def _projections(config: PlanConfig, kind: str | None) -> float:
    """All of a layer but the attention matrix, or the scan."""
    model, parallel = config.model, config.parallel
    tokens, size = _tokens(config, kind), _element(config)
    norms_tp = _tp(config) if parallel.sequence_parallel else 1
    dropout = 1 if model.hidden_dropout else 0
    # Of each branch the norm's input, the input of what follows, and the dropout's mask.
    branches = {None: 2, DECODER: 3}.get(kind, 1)
    shared = branches * tokens * model.hidden_size * (2 * size + dropout) / norms_tp
    if kind == MAMBA:
        return shared + tokens * mamba_activations(model, size, _tp(config))
    attends, feeds = kind in (None, ATTENTION, DECODER), kind != ATTENTION
    queries = model.num_attention_heads * model.head_size
    keys_values = 2 * model.query_groups * model.head_size
    # QK norms keep what comes into them.
    normed = queries + keys_values // 2 if model.qk_layernorm else 0
    if kind == DECODER:  # keys and values of the encoder's tokens
        crossed = 2 * queries * tokens + keys_values * _tokens(config)
        shared += crossed * size / _tp(config)
    gates = 2 if model.gated else 1
    moe = model.moe_layers / model.num_layers if kind is None else float(kind == EXPERTS)
    width = (1 - moe) * model.ffn_size + moe * model.moe_router_topk * model.moe_ffn_size
    width += moe * (model.moe_shared_expert_intermediate_size or 0)
    sharded = attends * (2 * queries + keys_values + normed) + feeds * (gates + 1) * width
    return shared + tokens * (sharded * size / _tp(config) + moe * _routing(model, size))


def _routing(model: ModelConfig, size: int) -> float:
    """Bytes a token of an MoE layer: a row into and one out of each chosen expert, which tensor
    parallelism does not cut, and fp32 logits and probabilities."""
    rows = 2 * model.moe_router_topk * model.hidden_size * size
    return rows + 2 * 4 * (model.num_experts or 0)


def _tp(config: PlanConfig) -> int:
    return config.parallel.tensor_model_parallel_size


def attention_matrix(config: PlanConfig) -> float:
    """Bytes of softmax, its mask and its dropped-out copy that each layer keeps: the 5as/h
    term; 0 where a kernel or recomputation does not keep them, or nothing attends."""
    if not config.model.has_attention:
        return 0.0
    return 0.0 if config.parallel.recompute_granularity is not None else _scores(config)


def _scores(config: PlanConfig, kind: str | None = None) -> float:
    model = config.model
    if kind == DECODER:
        decoded = model.decoder_seq_length
        pairs = decoded * (decoded + model.seq_length)
    else:
        pairs = model.seq_length**2
    if surely_fused(config.runtime.attention_backend):
        return 0.0
    size = _element(config)
    kept = 2 * size + 1 if model.attention_dropout else size
    scores = model.num_attention_heads * pairs * config.batch.micro_batch_size
    return scores * kept / config.parallel.context_parallel_size


def embedding_activations(config: PlanConfig) -> float:
    """The mask of the embedding's dropout."""
    if not config.model.hidden_dropout:
        return 0.0
    return _tokens(config) * config.model.hidden_size


def logits(config: PlanConfig) -> float:
    """Logits in the compute format and in fp32, of one micro-batch."""
    size = _element(config)
    each = 4 if size == 4 else size + 4
    shared = config.parallel.tensor_model_parallel_size
    tokens = _tokens(config, DECODER if config.model.family == "t5" else None)
    return tokens * config.model.padded_vocab_size * each / shared


def _tokens(config: PlanConfig, kind: str | None = None) -> float:
    model = config.model
    length = model.decoder_seq_length if kind == DECODER else model.seq_length
    per_rank = length / config.parallel.context_parallel_size
    return per_rank * config.batch.micro_batch_size


def _element(config: PlanConfig) -> int:
    return 4 if config.precision.precision == "fp32" else 2


def with_vocabulary(model: ModelConfig, assumed: int) -> ModelConfig:
    """The model with a vocabulary size, where none is given."""
    return model if model.vocab_size is not None else replace(model, vocab_size=assumed)
