"""Collectives that do not do what they should: left out, doubled, late, or of other rows.

A :class:`StandIn` takes the place of every plain collective of a rank's process, of the
messages between pipeline stages and of FSDP's own collectives. It notes which calls a layout
makes, and makes one of them wrong when told to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from mtk.models.gpt import GPT
from mtk.parallel import collectives, fsdp, pipeline
from mtk.parallel.collectives import InFlight
from mtk.parallel.deferred import Deferred
from mtk.parallel.grads import total_norm
from mtk.parallel.groups import Group
from mtk.parallel.messages import Expected
from mtk.parallel.pieces import Piece
from mtk.parallel.pipeline import Pipeline
from mtk.training import passes, step

PLAIN = ("all_reduce", "all_gather", "reduce_scatter", "exchange", "shift")
# What FSDP2 calls, under torch 2.13's name or the one before.
FSDP = {
    "fsdp.gather": ("all_gather_single", "all_gather_into_tensor"),
    "fsdp.scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "fsdp.copies": ("all_reduce",),
}


class StandIn:
    """live: the calls so far, e.g. ``all_reduce tp.mlp``. fault: the call that goes wrong and
    how, or None."""

    def __init__(self) -> None:
        self.live: set[str] = set()
        self.fault: tuple[str, str] | None = None
        self._before: dict[str, Any] = {}
        self._done = False

    def begin(self, fault: tuple[str, str] | None) -> None:
        self.live, self.fault, self._before, self._done = set(), fault, {}, False

    def how(self, call: str) -> str | None:
        """Note the call; what is to be wrong with it."""
        self.live.add(call)
        if self.fault is None or self.fault[0] != call:
            return None
        if self.fault[1] != "left out once":
            return self.fault[1]
        first, self._done = not self._done, True
        return "left out" if first else None

    def install(self) -> None:
        """For the rest of this process, wherever the functions were imported to."""
        for name in PLAIN:
            original = getattr(collectives, name)
            new = self._plain(name, original)
            for key, module in list(sys.modules.items()):
                if key.startswith("mtk.") and getattr(module, name, None) is original:
                    setattr(module, name, new)
        for call, names in FSDP.items():
            name = next(name for name in names if hasattr(dist, name))
            setattr(dist, name, self._of_fsdp(call, getattr(dist, name)))
        setattr(Expected, "wait", self._message(Expected.wait))  # noqa: B010

    def _plain(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, *rest: Any) -> Any:
            group, site = rest[2:4] if name == "exchange" else rest[:2]
            how = self.how(f"{name} {site}") if group.size > 1 else None
            if how is None:
                return original(x, *rest)
            if how == "left out":
                return _LEFT_OUT[name](x, group, rest)
            out = original(x, *rest)
            if isinstance(out, InFlight):
                return InFlight([_wrong(how, part, group) for part in out.wait()])
            return _wrong(how, out, group)

        return call

    def _of_fsdp(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*tensors: Tensor, **given: Any) -> Any:
            named = dict(zip(("output_tensor", "input_tensor"), tensors, strict=False))
            out = given.get("output", named.get("output_tensor"))
            x = given.get("input", named.get("input_tensor"))
            group = given["group"]
            how = self.how(f"{call} of {group.size()}")
            if how is None:
                return original(*tensors, **given)
            assert out is not None
            if how == "left out" and x is not None:
                own = x.repeat(group.size()) if out.numel() > x.numel() else x.chunk(group.size())
                out.copy_(own if isinstance(own, Tensor) else own[group.rank()])
            elif how != "left out":
                original(*tensors, **given | {"async_op": False})
                out.mul_(2)
            return None

        return function

    def _message(self, original: Callable[[Expected], tuple[Tensor, ...]]) -> Callable[..., Any]:
        def wait(expected: Expected) -> tuple[Tensor, ...]:
            tensors = original(expected)
            kind = expected.site.split()[0]
            how = self.how(kind)
            earlier = self._before.get(kind, tensors)
            self._before[kind] = tuple(x.detach().clone() for x in tensors)
            if how == "of the micro-batch before":
                return tuple(x.clone() for x in earlier)
            if how == "left out":
                return tuple(torch.zeros_like(x) for x in tensors)
            return tensors if how is None else tuple(2 * x for x in tensors)

        return wait


def _wrong(how: str, x: Tensor, group: Group) -> Tensor:
    if how == "doubled":
        return 2 * x
    if how == "of the other experts":
        return x.view(group.size, -1).roll(1, 1).flatten()
    assert how == "reversed", how
    return x.flip(0)


def _own_rows(x: Tensor, group: Group, rest: Any) -> Tensor:
    """As many rows as would come, of what would be sent."""
    del group
    wanted = x.shape[0] if rest[0] is None else sum(rest[0])
    rows = x[:wanted]
    return torch.cat((rows, rows.new_zeros(wanted - len(rows), *x.shape[1:])))


_LEFT_OUT: dict[str, Callable[[Any, Group, Any], Any]] = {
    "all_reduce": lambda x, group, rest: x,
    "all_gather": lambda x, group, rest: x.repeat(group.size, *(1,) * (x.ndim - 1)),
    "reduce_scatter": lambda x, group, rest: x.chunk(group.size)[group.rank].contiguous(),
    "exchange": _own_rows,
    "shift": lambda x, group, rest: InFlight(x),
}


# -- faults beside a collective ------------------------------------------------------------


def _norm_of_every_copy(
    gradients: Mapping[str, Tensor | None], pieces: Mapping[str, Piece], device: torch.device
) -> Tensor:
    own = [gradient for gradient in gradients.values() if gradient is not None]
    return total_norm(own, device).double().square()


def _tokens_of_every_part(x: Tensor, group: Group, site: str, *rest: Any) -> Tensor:
    out = collectives.all_reduce(x, group, site, *rest)
    return 2 * out if site == "step.valid_tokens" else out


def _divided(module: Any, *rest: Any, **named: Any) -> None:
    RIGHT_WRAP(module, *rest, **named)
    module.set_gradient_divide_factor(2.0)


def _last_micro_batch_held(model: GPT, *, reduce: bool, reshard: bool | None = None) -> None:
    RIGHT_HOLD(model, reduce=not reduce, reshard=reshard)


def _moved_twice(copy: Any, leader: Any) -> None:
    if copy.grad is not None:
        copy.grad = 2 * copy.grad
    RIGHT_MOVE(copy, leader)


def _dropped(copy: Any, leader: Any) -> None:
    copy.grad = None


def _first_lost(self: Deferred, micro: int) -> None:
    if micro == 0:
        self._waiting.pop(micro, None)
    RIGHT_FINISH(self, micro)


RIGHT_WRAP, RIGHT_HOLD = fsdp._wrap, fsdp.hold_gradients
RIGHT_MOVE, RIGHT_FINISH = pipeline._move_gradient, Deferred.finish

# Where, what, and what is there instead.
OTHER: dict[str, tuple[Any, str, Any]] = {
    "norm counts every copy": (step, "squared_norm", _norm_of_every_copy),
    "valid tokens counted by each context rank": (step, "all_reduce", _tokens_of_every_part),
    "gradients averaged over two": (fsdp, "_wrap", _divided),
    "last micro-batch not reduced": (passes, "hold_gradients", _last_micro_batch_held),
    "gradient of the tied copy dropped": (pipeline, "_move_gradient", _dropped),
    "gradient of the tied copy doubled": (pipeline, "_move_gradient", _moved_twice),
    "tied copy not refreshed": (Pipeline, "refresh_copies", lambda self: None),
    "delayed gradients of a micro-batch lost": (Deferred, "finish", _first_lost),
}


@contextmanager
def other_fault(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    where, attribute, wrong = OTHER[name]
    with patch.object(where, attribute, wrong):
        yield
