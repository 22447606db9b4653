"""Output matrix and cross-entropy as one operation that keeps no logits in fp32.

Logits are made, and at once replaced by the gradient of their loss (softmax - one-hot); the
gradient that arrives later for each token's loss is a factor of its row, which is cheap to bring
in with the states. With ``chunk`` only that many tokens' logits exist at a time, and backward
makes them again (as in Liger Kernel, Hsu et al. 2024, and Cut Cross-Entropy, Wijmans et al.
2024, whose order of computation differs).

Shape suffixes: B batch, S sequence, N = B x S tokens, E hidden size, V rows of the matrix, C
tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtk.kernels import fused_on

# (logits [N, V], labels [N], columns that count) -> losses [N]; the logits become their gradient.
Replace = Callable[[Tensor, Tensor, int], Tensor]
# The label of tokens that have no loss, as in PyTorch.
IGNORED = -100


def linear_losses(
    x_BSE: Tensor,
    weight_VE: Tensor,
    labels_BS: Tensor,
    used: int,
    chunk: int | None = None,
    replace: Replace | None = None,
) -> Tensor:
    """Cross-entropy in nats of each token, fp32 [B, S]: 0 of those labelled ``IGNORED``, NaN for
    any other label outside of the vocabulary.

    used: columns of the vocabulary that count; the matrix may be padded. chunk: tokens whose
    logits are held at a time (default: all, kept until backward in the states' type). replace:
    in place of :func:`softmax_minus_target_`, where ranks share the vocabulary.
    """
    losses_N: Tensor = _LinearLosses.apply(  # type: ignore[no-untyped-call]
        x_BSE.flatten(0, 1),
        weight_VE,
        labels_BS.flatten(),
        used,
        chunk,
        replace or softmax_minus_target_,
    )
    return losses_N.view_as(labels_BS)


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NE: Tensor,
        weight_VE: Tensor,
        labels_N: Tensor,
        used: int,
        chunk: int | None,
        replace: Replace,
    ) -> Tensor:
        ctx.used, ctx.chunk, ctx.replace = used, chunk, replace
        if chunk is None or chunk >= x_NE.shape[0]:
            logits_NV = x_NE @ weight_VE.t()
            losses_N = replace(logits_NV, labels_N, used)
            ctx.save_for_backward(x_NE, weight_VE, labels_N, logits_NV)
            return losses_N
        ctx.save_for_backward(x_NE, weight_VE, labels_N)
        return torch.cat(
            [
                replace(x_NE[part] @ weight_VE.t(), labels_N[part], used)
                for part in _parts(x_NE.shape[0], chunk)
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, weight_VE, labels_N, *kept = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_N1 = grad_N[:, None]
        if kept:
            (delta_NV,) = kept
            x_grad = (delta_NV @ weight_VE).mul_(grad_N1) if wants_x else None
            scaled_NE = (x_NE * grad_N1).to(x_NE.dtype)
            weight_grad = delta_NV.t() @ scaled_NE if wants_weight else None
            return x_grad, weight_grad, None, None, None, None
        x_grad = torch.empty_like(x_NE) if wants_x else None
        total_VE = torch.zeros_like(weight_VE, dtype=torch.float32) if wants_weight else None
        for part in _parts(x_NE.shape[0], ctx.chunk):
            x_CE = x_NE[part]
            delta_CV = x_CE @ weight_VE.t()
            ctx.replace(delta_CV, labels_N[part], ctx.used)
            if x_grad is not None:
                x_grad[part] = (delta_CV @ weight_VE).mul_(grad_N1[part])
            if total_VE is not None:
                _add_product(total_VE, delta_CV.t(), (x_CE * grad_N1[part]).to(x_CE.dtype))
        own = None if total_VE is None else total_VE.to(weight_VE.dtype)
        return x_grad, own, None, None, None, None


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (fp32) += a @ b without rounding the product."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def softmax_minus_target_(logits_NV: Tensor, labels_N: Tensor, used: int) -> Tensor:
    """Losses in nats, fp32 [N]; ``logits_NV`` becomes the gradient of each row's loss, 0 from
    column ``used`` on."""
    if fused_on(logits_NV.device):
        from mtk.kernels import cross_entropy  # imports Triton

        return cross_entropy.softmax_minus_target_(logits_NV, labels_N, used)
    highest_N, total_N, target_N = row_statistics(logits_NV, labels_N, used)
    target_N = target_N.masked_fill((labels_N < 0) | (labels_N >= used), float("nan"))
    return finish_(logits_NV, labels_N, labels_N, highest_N + total_N.log(), target_N, used)


# -- where a rank has some of the columns only ----------------------------------------------


def row_statistics(logits_NV: Tensor, labels_N: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row fp32 [N]: its maximum, the sum of exp(x - maximum), and the label's logit, 0
    for labels outside of 0..used - 1. A row without columns has a maximum of -1e30."""
    if fused_on(logits_NV.device) and used:
        from mtk.kernels import cross_entropy  # imports Triton

        return cross_entropy.row_statistics(logits_NV, labels_N, used)
    counted = logits_NV[:, :used].float()
    if not used:
        nothing = counted.new_zeros(counted.shape[0])
        return nothing - 1e30, nothing, nothing
    highest_N = counted.amax(-1)
    total_N = (counted - highest_N[:, None]).exp_().sum(-1)
    own_N = (labels_N >= 0) & (labels_N < used)
    target_N = counted.gather(-1, labels_N.where(own_N, 0)[:, None])[:, 0]
    return highest_N, total_N, target_N.where(own_N, 0.0)


def finish_(
    logits_NV: Tensor,
    labels_N: Tensor,
    own_N: Tensor,
    log_sum_N: Tensor,
    target_N: Tensor,
    used: int,
) -> Tensor:
    """Losses, and the gradient in place of ``logits_NV``, from the statistics of whole rows.
    own_N: the labels as columns of these logits. target_N: NaN where there is no such column."""
    ignored_N = labels_N == IGNORED
    # exp(x - inf) = 0 is their gradient.
    subtract_(logits_NV, own_N, log_sum_N.masked_fill(ignored_N, float("inf")), used)
    return (log_sum_N - target_N).masked_fill(ignored_N, 0.0)


def subtract_(logits_NV: Tensor, labels_N: Tensor, log_sums_N: Tensor, used: int) -> None:
    """``logits_NV`` becomes exp(x - log_sum), less 1 at the label if it lies in the row, and 0
    from column ``used`` on."""
    if fused_on(logits_NV.device):
        from mtk.kernels import cross_entropy  # imports Triton

        cross_entropy.subtract_(logits_NV, labels_N, log_sums_N, used)
        return
    delta = (logits_NV[:, :used].float() - log_sums_N[:, None]).exp_()
    own_N = (labels_N >= 0) & (labels_N < used)
    if used:
        delta.scatter_add_(-1, labels_N.where(own_N, 0)[:, None], -own_N[:, None].float())
    logits_NV[:, :used] = delta
    logits_NV[:, used:] = 0.0
