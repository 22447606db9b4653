"""The layout: how a model and its batch are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.model import ModelConfig, nearest_divisor, nearest_multiple
from mtk.config.moe import expert_width_problems
from mtk.config.schema import option
from mtk.errors import Problem


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
    data_parallel_sharding: Literal["replicate", "optimizer", "full"] = option(
        "replicate",
        help="What data-parallel ranks shard: nothing, gradients and optimizer, or all.",
        shortcuts=(("--use-distributed-optimizer", "optimizer"),),
    )
    num_distributed_optimizer_instances: int = option(
        1, help="Copies of the sharded state: shard inside each, replicate across (hybrid)."
    )
    overlap_grad_reduce: bool = option(True, help="Reduce gradients during backward.")
    overlap_param_gather: bool = option(True, help="Gather parameters during forward.")
    recompute_granularity: Literal["selective", "full"] | None = option(
        None,
        help="Recompute attention only, or whole layers, in backward.",
        shortcuts=(("--recompute-activations", "selective"),),
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None, help="Which layers full recomputation covers."
    )
    recompute_num_layers: int | None = option(None, help="Layers per recomputed unit.")
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

    def problems(self) -> Iterator[Problem]:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "nproc",
        ):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
        if self.recompute_granularity == "full" and self.recompute_method is None:
            fix = "Add --recompute-method uniform (or block)."
            yield Problem("recompute_granularity", "full", "needs a method", fix)
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            rule = "shards over tensor-parallel ranks, of which there is one"
            yield Problem("sequence_parallel", True, rule, "Raise --tp or leave it out.")

    def problems_with(self, model: ModelConfig) -> Iterator[Problem]:
        """Divisibility of the model by this layout."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        cp = self.context_parallel_size
        if min(tp, pp, cp) < 1 or model.num_attention_heads < 1:
            return
        if model.num_attention_heads % tp:
            rule = f"must divide model.num_attention_heads = {model.num_attention_heads}"
            fix = f"Nearest: {nearest_divisor(tp, model.num_attention_heads)}."
            yield Problem("parallel.tensor_model_parallel_size", tp, rule, fix)
        groups = model.query_groups
        if groups >= 1 and groups % tp and tp % groups:
            rule = f"must divide or be a multiple of model.num_query_groups = {groups}"
            fix = f"Nearest: {nearest_divisor(tp, groups)}."
            yield Problem("parallel.tensor_model_parallel_size", tp, rule, fix)
        if model.num_layers % pp:
            rule = f"must divide model.num_layers = {model.num_layers}"
            fix = f"Nearest: {nearest_divisor(pp, model.num_layers)}."
            yield Problem("parallel.pipeline_model_parallel_size", pp, rule, fix)
        chunk = self.num_layers_per_virtual_pipeline_stage
        if chunk is not None and (chunk < 1 or (model.num_layers // pp) % chunk):
            rule = f"must divide the layers per stage, {model.num_layers // pp}"
            yield Problem("parallel.num_layers_per_virtual_pipeline_stage", chunk, rule)
        if cp > 1 and model.seq_length % (2 * cp):
            rule = f"must be a multiple of 2 x context_parallel_size = {2 * cp}"
            fix = f"Nearest: {nearest_multiple(model.seq_length, 2 * cp)}."
            yield Problem("model.seq_length", model.seq_length, rule, fix)
        ep = self.expert_model_parallel_size
        if ep > 1 and model.num_experts is None:
            rule = "the model has no experts to share"
            yield Problem("parallel.expert_model_parallel_size", ep, rule, "Nearest: 1.")
        if ep > 1 and model.num_experts and model.num_experts % ep:
            rule = f"must divide model.num_experts = {model.num_experts}"
            fix = f"Nearest: {nearest_divisor(ep, model.num_experts)}."
            yield Problem("parallel.expert_model_parallel_size", ep, rule, fix)
        yield from expert_width_problems(model, tp)
