"""What differs between the supported versions of torch, or has no public name in them."""

from __future__ import annotations

from typing import Any

from torch import nn


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


def _parameter_groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return list(groups)
