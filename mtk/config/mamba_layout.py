"""Rules that tie a layout to a model's Mamba layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mtk.config.mamba import mamba_sizes
from mtk.config.nearest import divisors, nearest
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig
    from mtk.config.parallel import ParallelConfig


def shares_mamba_heads(tp: int, model: ModelConfig) -> bool:
    return not model.has_mamba or mamba_sizes(model).heads % tp == 0


def shares_mamba_groups(tp: int, model: ModelConfig) -> bool:
    """Ranks split the groups of B and C, or several ranks hold the same one."""
    groups = mamba_sizes(model).groups
    return not model.has_mamba or groups % tp == 0 or tp % groups == 0


def mamba_tensor_problems(
    parallel: ParallelConfig, model: ModelConfig, legal: Iterable[int]
) -> Iterator[Problem]:
    """legal: tensor-parallel sizes that all parts of the model allow."""
    tp, name = parallel.tensor_model_parallel_size, "parallel.tensor_model_parallel_size"
    sizes = mamba_sizes(model)
    if not shares_mamba_heads(tp, model):
        rule = f"must divide model.mamba_num_heads = {sizes.heads}"
        yield Problem(name, tp, rule, nearest(tp, legal))
    if not shares_mamba_groups(tp, model):
        rule = f"must divide or be a multiple of model.mamba_num_groups = {sizes.groups}"
        yield Problem(name, tp, rule, nearest(tp, legal))


def mamba_context_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    """Context-parallel ranks share the heads of a rank, whichever way attention takes."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp == 1 or not model.has_mamba:
        return
    heads = mamba_sizes(model).heads // tp
    if shares_mamba_heads(tp, model) and heads % cp:
        rule = f"must divide the {heads} Mamba heads of a rank, which it shares out"
        fix = nearest(cp, divisors(heads))
        yield Problem("parallel.context_parallel_size", cp, rule, fix)
    groups = max(1, mamba_sizes(model).groups // tp)
    if shares_mamba_groups(tp, model) and groups % cp and cp % groups:
        rule = f"must divide or be a multiple of the {groups} Mamba groups of a rank"
        fix = nearest(cp, [*divisors(groups), *(groups * n for n in range(1, heads + 1))])
        yield Problem("parallel.context_parallel_size", cp, rule, fix)
    if not model.has_attention and parallel.cp_comm_type != "p2p":
        rule = "is how attention meets, of which the model has none; Mamba exchanges heads"
        yield Problem("parallel.cp_comm_type", parallel.cp_comm_type, rule, "Leave it out.")
