"""The collectives of the parallel core: every one has a named call site.

Plain ones work on tensors without gradients; differentiable ones are built from them. A group
of one rank costs nothing. The call sites' names appear when a rank is missing (see
``groups.Trace``), and let tests remove or double each collective in turn.

Built on torch's functional collectives, which ``torch.compile`` traces and which run on gloo
and NCCL alike. Shapes: the first dimension is the one that is gathered or scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from mtk.parallel.compat import (
    gather_first_dimension,
    gather_times,
    scatter_sum_first_dimension,
    times_scatter,
)
from mtk.parallel.groups import Group

# -- plain ------------------------------------------------------------------------------


def all_reduce(x: Tensor, group: Group, site: str, op: str = "sum") -> Tensor:
    """The sum (or ``"max"``, ``"min"``) over the group; ``x`` stays as it is."""
    if group.size == 1:
        return x
    _enter(group, site)
    return finish(functional.all_reduce(x.contiguous(), op, group.handle), group)


def all_gather(x: Tensor, group: Group, site: str) -> Tensor:
    """[N, ...] of every rank -> [size x N, ...] in the group's order."""
    if group.size == 1:
        return x
    _enter(group, site)
    return finish(gather_first_dimension(x.contiguous(), group.handle), group)


def reduce_scatter(x: Tensor, group: Group, site: str) -> Tensor:
    """[size x N, ...] -> the sum over ranks of this rank's [N, ...] part."""
    if group.size == 1:
        return x
    _enter(group, site)
    return finish(scatter_sum_first_dimension(x.contiguous(), group.handle), group)


def start_reduce_scatter(x: Tensor, group: Group, site: str) -> Tensor:
    """What :func:`finish` turns into the result of :func:`reduce_scatter`; what runs in
    between overlaps with it. Not for a group of one rank."""
    _enter(group, site)
    # Under the compiler torch's own wrapper waits at once.
    operation = torch.ops._c10d_functional.reduce_scatter_tensor
    out: Tensor = operation(x.contiguous(), "sum", group.size, group.handle.group_name)
    return out


def gather_products(
    x_RE: Tensor, matrices: Sequence[Tensor], group: Group, site: str
) -> tuple[Tensor, list[Tensor]]:
    """x of all ranks [M, E], and its products with each of the matrices [E, F]. On CUDA each
    rank's rows are multiplied as they arrive."""
    if not x_RE.is_cuda:
        x_ME = all_gather(x_RE, group, site)
        return x_ME, [x_ME @ matrix for matrix in matrices]
    _enter(group, site)
    gathered, products = gather_times(x_RE.contiguous(), list(matrices), group.handle)
    _leave(group)
    return gathered, products


def products_scatter(x_ME: Tensor, matrix_EF: Tensor, group: Group, site: str) -> Tensor:
    """x @ matrix summed over ranks, this rank's rows [R, F]. On CUDA each
    rank's rows leave when they are done."""
    if not x_ME.is_cuda:
        return reduce_scatter(x_ME @ matrix_EF, group, site)
    _enter(group, site)
    out = times_scatter(x_ME.contiguous(), matrix_EF, group.handle)
    _leave(group)
    return out


def exchange(
    x: Tensor, receive: Sequence[int] | None, send: Sequence[int] | None, group: Group, site: str
) -> Tensor:
    """All-to-all: rows of ``x`` cut by ``send`` go to the ranks in order; ``receive`` says how
    many rows come from each (None: equal parts). Zero rows are fine."""
    if group.size == 1:
        return x
    _enter(group, site)
    out = functional.all_to_all_single(
        x.contiguous(),
        None if receive is None else list(receive),
        None if send is None else list(send),
        group.handle,
    )
    return finish(out, group)


class InFlight:
    """Tensors on their way from another rank; :meth:`wait` hands them over."""

    def __init__(
        self,
        received: Sequence[Tensor],
        works: Sequence[dist.Work] = (),
        sent: Sequence[Tensor] = (),
        group: Group | None = None,
        site: str = "",
    ) -> None:
        self._received, self._works = tuple(received), tuple(works)
        # What is sent must live, and must not change, until it has left.
        self._sent, self._group, self._site = tuple(sent), group, site

    def wait(self) -> tuple[Tensor, ...]:
        """The received tensors. On CUDA the current stream waits, the host does not."""
        if self._group is not None:
            _enter(self._group, self._site)
            for work in self._works:
                work.wait()
            self._group.trace.leave()
            self._works, self._sent, self._group = (), (), None
        return self._received


def shift(tensors: Sequence[Tensor], group: Group, site: str, step: int = 1) -> InFlight:
    """Start to send ``tensors`` to the rank ``step`` further and to receive their like from the
    rank ``step`` before, around the ring; what runs until ``wait()`` overlaps with it.

    All ranks of the group must call it, with equal shapes. Not traceable: keep it out of
    compiled regions.
    """
    if group.size == 1:
        return InFlight(tensors)
    _enter(group, site)
    sent = [x.contiguous() for x in tensors]
    received = [torch.empty_like(x) for x in sent]
    target = group.ranks[(group.rank + step) % group.size]
    source = group.ranks[(group.rank - step) % group.size]
    # Point-to-point operations without coalescing on gloo, grouped on NCCL.
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x, target, group.handle) for x in sent]
        + [dist.P2POp(dist.irecv, x, source, group.handle) for x in received]
    )
    group.trace.leave()
    return InFlight(received, works, sent, group, site)


def share_object(value: Any, group: Group, site: str) -> Any:
    """What the group's first rank has, on every rank (small Python values)."""
    if group.size == 1:
        return value
    _enter(group, site)
    box = [value]
    dist.broadcast_object_list(box, src=group.ranks[0], group=group.handle)
    group.trace.leave()
    return box[0]


def gather_objects(value: Any, group: Group, site: str) -> list[Any]:
    """What every rank has, in the group's order, on every rank (small Python values)."""
    if group.size == 1:
        return [value]
    _enter(group, site)
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, value, group=group.handle)
    group.trace.leave()
    return found


def _enter(group: Group, site: str) -> None:
    if not torch.compiler.is_compiling():
        group.trace.enter(site, group.name)


def finish(pending: Tensor, group: Group) -> Tensor:
    """Wait for what was started; on CUDA the stream waits, the host does not."""
    out: Tensor = functional.wait_tensor(pending)  # type: ignore[no-untyped-call]
    _leave(group)
    return out


def _leave(group: Group) -> None:
    if not torch.compiler.is_compiling():
        group.trace.leave()


# -- differentiable ---------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, site: str) -> Tensor:
        ctx.group, ctx.site = group, site
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad, ctx.group, ctx.site), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, site: str) -> Tensor:
        return all_reduce(x, group, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, site: str, replicated: bool) -> Tensor:
        ctx.group, ctx.site, ctx.replicated, ctx.rows = group, site, replicated, x.shape[0]
        return all_gather(x, group, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.replicated:
            start = ctx.group.rank * ctx.rows
            return grad[start : start + ctx.rows], None, None, None
        return reduce_scatter(grad, ctx.group, f"{ctx.site}.backward"), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, site: str) -> Tensor:
        ctx.group, ctx.site = group, site
        return reduce_scatter(x, group, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.group, f"{ctx.site}.backward"), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        receive: Sequence[int] | None,
        send: Sequence[int] | None,
        group: Group,
        site: str,
    ) -> Tensor:
        ctx.receive, ctx.send, ctx.group, ctx.site = receive, send, group, site
        return exchange(x, receive, send, group, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = exchange(grad, ctx.send, ctx.receive, ctx.group, f"{ctx.site}.backward")
        return back, None, None, None, None


def copy_to_parts(x: Tensor, group: Group, site: str) -> Tensor:
    """Hand the same ``x`` to ranks that each compute a part: gradients are summed."""
    return x if group.size == 1 else _apply(_Copy, x, group, site)


def sum_of_parts(x: Tensor, group: Group, site: str) -> Tensor:
    """The sum of partial results, on every rank; its gradient is the same on every rank."""
    return x if group.size == 1 else _apply(_Reduce, x, group, site)


def gather_rows(x: Tensor, group: Group, site: str, *, replicated: bool = False) -> Tensor:
    """Join rows of all ranks. What follows differs on each rank, so gradients are summed and
    scattered; ``replicated``: it is the same on every rank, each takes its part of the gradient."""
    return x if group.size == 1 else _apply(_Gather, x, group, site, replicated)


def scatter_sum_of_parts(x: Tensor, group: Group, site: str) -> Tensor:
    """Sum partial results and keep this rank's rows."""
    return x if group.size == 1 else _apply(_Scatter, x, group, site)


def exchange_rows(
    x: Tensor, receive: Sequence[int] | None, send: Sequence[int] | None, group: Group, site: str
) -> Tensor:
    """Differentiable :func:`exchange`."""
    return x if group.size == 1 else _apply(_Exchange, x, receive, send, group, site)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    out: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return out
