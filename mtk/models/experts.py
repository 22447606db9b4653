"""The experts of an MoE layer: one grouped matrix multiply over tokens sorted by expert.

Shape suffixes: T tokens, K experts a token goes to, M = T x K assignments, R rows that arrive
at these experts, X experts, E hidden size, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.mlp import ACTIVATIONS


class Experts(nn.Module):
    """X MLPs without biases; a rank may hold some of them, and a part of each.

    gate (gated activations only), up: [X, F, E]; down: [X, E, F].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        wide = (config.num_experts, config.moe_ffn_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        gated = config.gated
        self.gate = nn.Parameter(torch.empty(wide)) if gated else None
        self.up = nn.Parameter(torch.empty(wide))
        self.down = nn.Parameter(torch.empty(wide[0], wide[2], wide[1]))

    def forward(self, x_RE: Tensor, ends_X: Tensor) -> Tensor:
        """[R, E] -> [R, E]. ends_X: int32, after which row each expert's tokens end."""
        up_RF = _grouped(x_RE, self.up, ends_X)
        if self.gate is None:
            inner_RF = self.activation(up_RF)
        else:
            inner_RF = self.activation(_grouped(x_RE, self.gate, ends_X)) * up_RF
        return _grouped(inner_RF, self.down, ends_X)


def _grouped(x_RI: Tensor, weight_XOI: Tensor, ends_X: Tensor) -> Tensor:
    # torch.compile takes grouped_mm in bf16 only (torch 2.11 to 2.13).
    multiply = F.grouped_mm if x_RI.dtype == torch.bfloat16 else _uncompiled
    return multiply(x_RI, weight_XOI.transpose(1, 2), offs=ends_X)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(x_RI: Tensor, weight_XIO: Tensor, *, offs: Tensor) -> Tensor:
    return F.grouped_mm(x_RI, weight_XIO, offs=offs)


def reference_experts(
    experts: Experts, x_TE: Tensor, weights_TK: Tensor, chosen_TK: Tensor
) -> Tensor:
    """The formula as a loop over experts; what sorting and dispatching is checked against."""
    out_TE = torch.zeros_like(x_TE)
    for index in range(experts.up.shape[0]):
        tokens, slots = torch.where(chosen_TK == index)
        x = x_TE[tokens]
        inner = experts.activation(
            x @ (experts.up if experts.gate is None else experts.gate)[index].T
        )
        if experts.gate is not None:
            inner = inner * (x @ experts.up[index].T)
        weight = weights_TK[tokens, slots, None].to(x.dtype)
        out_TE = out_TE.index_add(0, tokens, inner @ experts.down[index].T * weight)
    return out_TE


# -- dispatch ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """Rows as they arrived at the experts. ends_X: see :meth:`Experts.forward`."""

    ends_X: Tensor


A = TypeVar("A", bound=Arrival)


class Dispatcher(Protocol[A]):
    """Takes rows to their experts and back.

    dispatch: rows [M, E] sorted by expert, of which the first ``counts_X.sum()`` have one
    (int64 counts, all experts of the model; the others were dropped) -> rows [R, E] sorted by
    local expert, and how they came. combine: the experts' outputs -> [M, E] in the order given
    to dispatch; those of dropped rows are finite and otherwise meaningless.
    """

    def dispatch(self, x_ME: Tensor, counts_X: Tensor) -> tuple[Tensor, A]: ...
    def combine(self, out_RE: Tensor, arrival: A) -> Tensor: ...


class LocalDispatcher:
    """All experts are here: nothing moves, and the host waits for nothing."""

    def dispatch(self, x_ME: Tensor, counts_X: Tensor) -> tuple[Tensor, Arrival]:
        ends_X = counts_X.cumsum(0)
        # Dropped rows ride along with the last expert, as no shape may depend on their number.
        ends_X[-1:] = x_ME.shape[0]
        return x_ME, Arrival(ends_X.int())

    def combine(self, out_RE: Tensor, arrival: Arrival) -> Tensor:
        del arrival
        return out_RE


# -- order ------------------------------------------------------------------------------
# A permutation's gradient is the inverse permutation: only reads, in a fixed order, where
# indexing would add up atomically.


def inverse_of(order_M: Tensor) -> Tensor:
    """The permutation that undoes ``order_M``."""
    places = torch.arange(order_M.shape[0], device=order_M.device)
    return torch.empty_like(order_M).scatter_(0, order_M, places)


def spread(x_TE: Tensor, order_M: Tensor, inverse_M: Tensor, k: int) -> Tensor:
    """One row for each of a token's ``k`` assignments, in the order given: [T, E] -> [M, E]."""
    return _apply(_Spread, x_TE, order_M, inverse_M, k)


def permute(x_ME: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
    """Rows in another order."""
    return _apply(_Permute, x_ME, order_M, inverse_M)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, order_M: Tensor, inverse_M: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.k = k
        return x_TE[order_M // k]

    @staticmethod
    def backward(ctx: Any, grad_ME: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_M,) = ctx.saved_tensors
        grad_TKE = grad_ME[inverse_M].view(-1, ctx.k, grad_ME.shape[1])
        return grad_TKE.sum(1), None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ME: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_ME[order_M]

    @staticmethod
    def backward(ctx: Any, grad_ME: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        # grouped_mm's own backward refuses expanded gradients.
        return grad_ME[inverse_M].contiguous(), None, None


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    out: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return out
