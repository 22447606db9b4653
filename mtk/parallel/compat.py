"""What differs between the supported versions of torch, or has no public name in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def gather_first_dimension(x: Tensor, group: Any) -> Tensor:
    """All-gather; torch 2.13 has it under a new name and warns of the old one."""
    name = "all_gather_single" if hasattr(functional, "all_gather_single") else "all_gather_tensor"
    out: Tensor = getattr(functional, name)(x, 0, group)
    return out


def scatter_sum_first_dimension(x: Tensor, group: Any) -> Tensor:
    """Reduce-scatter; likewise."""
    new = hasattr(functional, "reduce_scatter_single")
    name = "reduce_scatter_single" if new else "reduce_scatter_tensor"
    out: Tensor = getattr(functional, name)(x, "sum", 0, group)
    return out


def gather_times(x: Tensor, matrices: list[Tensor], group: Any) -> tuple[Tensor, list[Tensor]]:
    """Rows of all ranks and their products with each matrix, by copies between GPUs' symmetric
    memory behind the products. CUDA only."""
    operation = torch.ops.symm_mem.fused_all_gather_matmul
    gathered, products = operation(x, matrices, 0, group.group_name, return_A=True)
    return gathered, list(products)


def times_scatter(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    """x @ matrix summed over ranks, this rank's rows; likewise."""
    operation = torch.ops.symm_mem.fused_matmul_reduce_scatter
    out: Tensor = operation(x, matrix, "sum", 0, group.group_name)
    return out


def prepare_symmetric_memory(group: Any) -> None:
    """Let the ranks of ``group`` read each other's memory; torch 2.13 does so unasked."""
    import torch.distributed._symmetric_memory as symmetric

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        symmetric.enable_symm_mem_for_group(group.group_name)


@contextmanager
def fitting_warnings(*, first: bool) -> Iterator[None]:
    """Inside the block the first rank alone shows warnings, and of torch's only those that
    apply: 2.13 warns of in-place operations on what a module returns, and mtk has none."""
    with warnings.catch_warnings():
        if not first:
            warnings.simplefilter("ignore")
        view = "FSDP2-wrapped module .* returned a view tensor"
        warnings.filterwarnings("ignore", message=view, category=UserWarning)
        yield


def finish_backward(model: nn.Module) -> None:
    """Run FSDP2's end of backward for every unit of its root ``model``.

    torch's own pipeline stages do the same after backward passes that reduced nothing;
    2.13 may have several parameter groups in a unit, 2.11 has at most one.
    """
    state: Any = model._get_fsdp_state()  # type: ignore[operator]
    for unit in state._state_ctx.all_states:
        for group in _parameter_groups(unit):
            group.post_backward()
    state._root_post_backward_final_callback()


def widen_gradients(model: nn.Module) -> None:
    """Move what ``.grad`` of gathered weights holds to FSDP2's sums in fp32, as it does by
    itself only after a backward pass."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            for group in _parameter_groups(unit._get_fsdp_state()):
                for parameter in group.fsdp_params:
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()


def _parameter_groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return list(groups)
