"""The layout: how a model and its batch are spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.config.layout_rules import (
    expert_problems,
    pipeline_problems,
    recompute_problems,
    sequence_problems,
    tensor_problems,
)
from mtk.config.model import ModelConfig
from mtk.config.nearest import nearest
from mtk.config.schema import option
from mtk.config.world_rules import batch_problems, world_problems
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.pretrain import BatchConfig

# At least 1 where given.
COUNTS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_distributed_optimizer_instances",
    "recompute_num_layers",
    "nproc",
)
# Options that only mean something with a pipeline.
PIPELINE_OPTIONS = (
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_schedule",
    "pipeline_split",
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism and the memory options that go with them."""

    tensor_model_parallel_size: int = option(
        1, help="Ranks that share each matrix.", aliases=("--tp",)
    )
    pipeline_model_parallel_size: int = option(
        1, help="Stages that share the layers.", aliases=("--pp",)
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, help="Layers per chunk of the interleaved schedule."
    )
    context_parallel_size: int = option(
        1, help="Ranks that share each sequence.", aliases=("--cp",)
    )
    expert_model_parallel_size: int = option(
        1, help="Ranks that share the experts.", aliases=("--ep",)
    )
    pipeline_schedule: Literal["1f1b", "interleaved", "zero-bubble", "zbv"] | None = option(
        None,
        help="Order of forward and backward passes (default: 1f1b, or interleaved with virtual "
        "stages).",
    )
    pipeline_split: tuple[int, ...] | None = option(
        None,
        help="Layers of each (virtual) stage, first to last (default: balanced by cost, the "
        "output matrix counted).",
    )
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] = option(
        "p2p", help="How context-parallel ranks share keys and values: ring, gather, or by head."
    )
    sequence_parallel: bool = option(False, help="Shard norms and dropout over the TP ranks.")
    tp_comm_overlap: bool = option(
        False,
        help="Hide communication of sequence-parallel layers behind their matrix products, by "
        "copies between GPUs' memory.",
    )
    data_parallel_sharding: Literal["replicate", "optimizer", "full"] = option(
        "replicate",
        help="What data-parallel ranks shard: nothing, gradients and optimizer, or all.",
        shortcuts=(("--use-distributed-optimizer", "optimizer"),),
    )
    num_distributed_optimizer_instances: int = option(
        1, help="Copies of the sharded state: shard inside each, replicate across (hybrid)."
    )
    shard_accumulated_gradients: bool = option(
        False,
        help="Reduce gradients after every micro-batch, so that only this rank's shard of them "
        "adds up: less memory, more communication (sharding full always does).",
    )
    overlap_grad_reduce: bool = option(True, help="Reduce gradients during backward.")
    overlap_param_gather: bool = option(True, help="Gather parameters during forward.")
    recompute_granularity: Literal["selective", "full"] | None = option(
        None,
        help="Recompute in backward: attention scores only (a fused attention kernel keeps none "
        "anyway), or whole layers (default: nothing).",
        shortcuts=(("--recompute-activations", "selective"),),
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None,
        help="Full recomputation: all layers in units that keep their first input, or the first "
        "layers of each stage.",
    )
    recompute_num_layers: int | None = option(
        None, help="Layers of a unit (uniform), or recomputed layers of each stage (block); 1."
    )
    nproc: int = option(1, help="Local ranks to start.", runtime=True)
    distributed_timeout_minutes: float = option(
        10.0, help="How long a collective waits for a missing rank.", runtime=True
    )
    replica_check_interval: int = option(
        0,
        help="Steps between checks that copies on different ranks are equal; 0: never.",
        runtime=True,
    )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def timeout_seconds(self) -> float:
        """How long a collective waits for a missing rank."""
        return self.distributed_timeout_minutes * 60

    def stages_per_rank(self, layers: int) -> int:
        """(Virtual) stages that each pipeline rank holds of a model with ``layers`` layers:
        as the split or the layers per virtual stage say, else 2 where the schedule needs them."""
        if self.pipeline_split is not None:
            return max(1, len(self.pipeline_split) // self.pipeline_model_parallel_size)
        chunk = self.num_layers_per_virtual_pipeline_stage
        if chunk is not None:
            return max(1, layers // (self.pipeline_model_parallel_size * chunk))
        return 2 if self.pipeline_schedule in ("interleaved", "zbv") else 1

    def schedule(self, layers: int) -> str:
        """The schedule asked for, or the one that fits the stages of each rank."""
        default = "interleaved" if self.stages_per_rank(layers) > 1 else "1f1b"
        return self.pipeline_schedule or default

    def problems(self) -> Iterator[Problem]:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")
        minutes = self.distributed_timeout_minutes
        if not 0 < minutes < math.inf:
            rule = "must be greater than 0 and finite"
            yield Problem("distributed_timeout_minutes", minutes, rule, "Nearest: 10 is usual.")
        if self.replica_check_interval < 0:
            found = self.replica_check_interval
            yield Problem("replica_check_interval", found, "must be 0 or more", "Nearest: 0.")
        yield from self._recompute()
        yield from self._unused()
        yield from self._split()

    def _recompute(self) -> Iterator[Problem]:
        granularity, method = self.recompute_granularity, self.recompute_method
        if granularity == "full" and method is None:
            fix = "Add --recompute-method uniform (or block)."
            yield Problem("recompute_granularity", "full", "needs a method", fix)
        if granularity != "full" and method is not None:
            rule = f"chooses among whole layers; the granularity is {granularity}"
            fix = "Add --recompute-granularity full, or leave it out."
            yield Problem("recompute_method", method, rule, fix)
        if method is None and self.recompute_num_layers is not None:
            rule = "counts layers of a method, and there is none"
            fix = "Add --recompute-granularity full --recompute-method uniform, or leave it out."
            yield Problem("recompute_num_layers", self.recompute_num_layers, rule, fix)

    def _unused(self) -> Iterator[Problem]:
        """Options whose technique is off."""
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            rule = "shards over tensor-parallel ranks, of which there is one"
            yield Problem("sequence_parallel", True, rule, "Raise --tp or leave it out.")
        if self.tp_comm_overlap and not self.sequence_parallel:
            rule = "hides what sequence parallelism sends"
            yield Problem("tp_comm_overlap", True, rule, "Add --sequence-parallel or leave it out.")
        if self.tp_comm_overlap and self.pipeline_schedule in ("zero-bubble", "zbv"):
            rule = f"computes weight gradients at once; {self.pipeline_schedule} delays them"
            fix = "Use --pipeline-schedule 1f1b or interleaved."
            yield Problem("tp_comm_overlap", True, rule, fix)
        if self.context_parallel_size == 1 and self.cp_comm_type != "p2p":
            rule = "is between context-parallel ranks, of which there is one"
            yield Problem("cp_comm_type", self.cp_comm_type, rule, "Raise --cp or leave it out.")
        if self.pipeline_model_parallel_size == 1:
            for name in PIPELINE_OPTIONS:
                if getattr(self, name) is not None:
                    rule = "orders pipeline stages, of which there is one"
                    fix = "Raise --pp or leave it out."
                    yield Problem(name, getattr(self, name), rule, fix)
        if self.shard_accumulated_gradients and self.data_parallel_sharding == "replicate":
            rule = "adds up shards of gradients, and nothing is sharded"
            fix = "Add --use-distributed-optimizer."
            yield Problem("shard_accumulated_gradients", True, rule, fix)
        if self.shard_accumulated_gradients and self.pipeline_model_parallel_size > 1:
            rule = "pipeline stages reduce gradients once, in the last backward of a step"
            yield Problem("shard_accumulated_gradients", True, rule, "Leave it out, or --pp 1.")
        copies = self.num_distributed_optimizer_instances
        if copies > 1 and self.data_parallel_sharding == "replicate":
            rule = "copies a sharded optimizer, and nothing is sharded"
            fix = "Add --use-distributed-optimizer (or --data-parallel-sharding full)."
            yield Problem("num_distributed_optimizer_instances", copies, rule, fix)

    def _split(self) -> Iterator[Problem]:
        split, stages = self.pipeline_split, self.pipeline_model_parallel_size
        if split is None or stages <= 1:
            return
        if min(split, default=0) < 1:
            rule = "needs at least one layer in each stage"
            fix = f"Nearest: {' '.join(str(max(1, layers)) for layers in split)}."
            yield Problem("pipeline_split", split, rule, fix if split else "")
        if len(split) % stages:
            rule = f"has {len(split)} numbers; their count must be a multiple of PP = {stages}"
            legal = [stages * (len(split) // stages), stages * (len(split) // stages + 1)]
            fix = nearest(len(split), [count for count in legal if count])
            yield Problem("pipeline_split", split, rule, fix.replace(".", " numbers."))
        if self.num_layers_per_virtual_pipeline_stage is not None:
            rule = "already says how many layers each virtual stage has"
            fix = "Leave out --num-layers-per-virtual-pipeline-stage."
            yield Problem("pipeline_split", split, rule, fix)

    @property
    def _countable(self) -> bool:
        """The degrees are numbers that can be divided by."""
        given = [getattr(self, name) for name in COUNTS]
        return all(value is None or value >= 1 for value in given)

    def problems_with(self, model: ModelConfig) -> Iterator[Problem]:
        """What of the model this layout cannot share out; keys from the root."""
        sizes = (model.num_layers, model.num_attention_heads, model.query_groups, model.ffn_size)
        units: tuple[int, ...] = (model.seq_length, model.hidden_size)
        units += (model.make_vocab_size_divisible_by, model.mamba_num_groups)
        if not self._countable or min(*sizes, *units) < 1:
            return
        yield from tensor_problems(self, model)
        yield from sequence_problems(self, model)
        yield from pipeline_problems(self, model)
        yield from expert_problems(self, model)
        yield from recompute_problems(self, model)

    def problems_with_world(
        self, model: ModelConfig, batch: BatchConfig, world: int, key: str = "parallel.nproc"
    ) -> Iterator[Problem]:
        """What of the ranks and of the batch cannot be shared out.

        key: the option that gave the number of ranks.
        """
        if not self._countable or model.num_layers < 1 or model.num_attention_heads < 1:
            return
        if world < 1:
            return
        yield from world_problems(self, model, world, key)
        yield from batch_problems(self, batch, world)
