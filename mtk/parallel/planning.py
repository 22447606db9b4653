"""Memory of the fullest rank, by formula: nothing here is measured.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large
Transformer Models", table 2) written term by term, so that other MLP widths, grouped
keys and 4-byte formats fit in; bytes of weights and optimizer follow the ZeRO table of
Megatron's distributed optimizer (18 or 6 + 12/d a parameter in bf16 with fp32
gradients). Not in it: fragmentation, workspaces, NCCL buffers, the CUDA context.
Symbols: s sequence, b micro-batch, h hidden, a heads, t p c d the four degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtk.config.model import ModelConfig
from mtk.config.plan import PlanConfig
from mtk.models.count import expert_weights
from mtk.models.count_families import layers_of, parameters

# Bytes a parameter: (weight, gradient, optimizer with main weights).
BYTES = {"fp32": (4, 4, 8), "bf16": (2, 4, 12), "fp16": (2, 2, 16)}


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
    """One rank of pipeline stage ``stage``."""
    experts = stage_experts(config)
    held = stage_parameters(config, stage)
    weight, gradient, optimizer = BYTES[config.precision.precision]
    shards = config.data_parallel_size * config.parallel.context_parallel_size
    expert_shards = shards / config.parallel.expert_model_parallel_size
    # Fewer ranks hold the same experts than the same of all else.
    sharded = (held - experts) / shards + experts / expert_shards
    sharding = config.parallel.data_parallel_sharding
    everything = sharded if sharding == "full" else held
    return RankMemory(
        stage=stage,
        parameters=held,
        weights=everything * weight,
        gradients=everything * gradient,
        optimizer=(held if sharding == "replicate" else sharded) * optimizer,
        activations=layer_activations(config) * layers_in_flight(config, stage)
        + (embedding_activations(config) if stage == 0 else 0),
        logits=logits(config) if stage == config.parallel.pipeline_model_parallel_size - 1 else 0,
    )


def stage_parameters(config: PlanConfig, stage: int) -> float:
    """Parameters a rank of this stage holds: matrices are shared over TP, norms counted so too."""
    model, parallel = config.model, config.parallel
    last = parallel.pipeline_model_parallel_size - 1
    table = model.padded_vocab_size * model.hidden_size
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    blocks = parameters(model) - tables * table - expert_weights(model)
    held = blocks / parallel.pipeline_model_parallel_size
    if stage == 0:
        held += table
    # A tied output matrix is a second copy where first and last stage differ.
    if stage == last and (last > 0 or tables == 2):
        held += table
    return held / parallel.tensor_model_parallel_size + stage_experts(config)


def stage_experts(config: PlanConfig) -> float:
    """Of these, weights of experts: shared over EP too."""
    parallel = config.parallel
    ways = parallel.pipeline_model_parallel_size * parallel.expert_model_parallel_size
    return expert_weights(config.model) / ways / parallel.tensor_model_parallel_size


def layers_in_flight(config: PlanConfig, stage: int) -> float:
    """Layers x micro-batches whose activations are alive at once in 1F1B."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    per_stage = layers_of(config.model) / stages
    microbatches = config.global_batch_size // (
        config.batch.micro_batch_size * config.data_parallel_size
    )
    alive = float(min(stages - stage, microbatches))
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    if chunk and stages > 1:
        chunks = config.model.num_layers / stages / chunk
        alive *= 1 + (stages - 1) / (stages * chunks)
    return per_stage * alive


def layer_activations(config: PlanConfig) -> float:
    """Bytes that one layer keeps for backward, for one micro-batch on one rank."""
    model, parallel = config.model, config.parallel
    tokens = model.seq_length / parallel.context_parallel_size * config.batch.micro_batch_size
    tp = parallel.tensor_model_parallel_size
    norms_tp = tp if parallel.sequence_parallel else 1
    size = _element(config)
    if parallel.recompute_granularity == "full":
        # Only the layer's input is kept; the layer being recomputed is not counted.
        return tokens * model.hidden_size * size / norms_tp
    dropout = 1 if model.hidden_dropout else 0
    # Two norm inputs and the inputs of QKV and of the MLP, and two dropout masks.
    shared = tokens * model.hidden_size * (4 * size + 2 * dropout) / norms_tp
    queries = model.num_attention_heads * model.head_size
    keys_values = 2 * model.query_groups * model.head_size
    gates = 2 if model.activation == "swiglu" else 1
    experts = model.moe_layers / model.num_layers
    width = (1 - experts) * model.ffn_size + experts * model.moe_router_topk * model.moe_ffn_size
    sharded = 2 * queries + keys_values + (gates + 1) * width
    dense = shared + (tokens * sharded * size + attention_matrix(config)) / tp
    return dense + experts * tokens * routing_activations(model, size)


def routing_activations(model: ModelConfig, size: int) -> float:
    """Bytes a token of an MoE layer (on average over layers): a row into and one out of each
    chosen expert, which tensor parallelism does not cut, and fp32 logits and probabilities."""
    if model.num_experts is None:
        return 0.0
    return 2 * model.moe_router_topk * model.hidden_size * size + 2 * 4 * model.num_experts


def attention_matrix(config: PlanConfig) -> float:
    """Bytes of softmax, its mask and its dropped-out copy: the 5as/h term; 0 where a kernel
    or selective recomputation does not keep them."""
    model = config.model
    unkept = config.runtime.attention_backend == "flash"
    if unkept or config.parallel.recompute_granularity is not None:
        return 0.0
    size = _element(config)
    kept = 2 * size + 1 if model.attention_dropout else size
    scores = model.num_attention_heads * model.seq_length**2 * config.batch.micro_batch_size
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
    return _tokens(config) * config.model.padded_vocab_size * each / shared


def _tokens(config: PlanConfig) -> float:
    per_rank = config.model.seq_length / config.parallel.context_parallel_size
    return per_rank * config.batch.micro_batch_size


def _element(config: PlanConfig) -> int:
    return 4 if config.precision.precision == "fp32" else 2


def with_vocabulary(model: ModelConfig, assumed: int) -> ModelConfig:
    """The model with a vocabulary size, where none is given."""
    from dataclasses import replace

    return model if model.vocab_size is not None else replace(model, vocab_size=assumed)
