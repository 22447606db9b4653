"""AdamW (Loshchilov and Hutter 2019) over many tensors in one launch. Needs Triton.

Each value of a gradient is read once, scaled, and moves its fp32 weight and moments, which are
read and written once; the weight is also rounded into the parameter that the model computes
with. torch's fused AdamW with what comes before and after it (widening, scaling, rounding) takes
about twice the bytes, and a launch a tensor for some of them.

Tensors are found through a table in device memory, a row for each: addresses may change from
step to step, as those of gradients do, and are sent anew each time (about a hundred bytes a
tensor).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtk.kernels.transfer import send

# Values that one program moves, and how many of them at a time: four a thread, which is 16 bytes
# of fp32 in each access. More would have stores of two widths, and a change of layout between them.
CHUNK = 8192
BLOCK = 1024
WARPS = 8
# Entries of a row: five addresses (0: none), number of values, whether they decay, first program.
ROW = tl.constexpr(8)
# Vectorised accesses need addresses that are multiples of this many bytes.
ALIGNMENT = tl.constexpr(16)
# Of what kinds of steps (with all weights, without some) the programs are remembered.
REMEMBERED = 8

# Of gradients, and of parameters if there are any to be written.
Types = tuple[torch.dtype, torch.dtype | None]
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(row, entry: tl.constexpr, type_: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + entry).to(tl.pointer_type(type_))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, ALIGNMENT)
    return pointer


@triton.jit
def _move(
    at,
    mask,
    main,
    gradient,
    exp_avg,
    exp_avg_sq,
    parameter,
    factor,
    decay,
    rate1,
    rate2,
    eps,
    step_size,
    correction2,
    parameter_type: tl.constexpr,
):
    """The values at the offsets ``at`` of one tensor."""
    g = tl.load(gradient + at, mask=mask).to(tl.float32) * factor
    p = tl.load(main + at, mask=mask)
    m = tl.load(exp_avg + at, mask=mask)
    v = tl.load(exp_avg_sq + at, mask=mask)
    # Not p * (1 - decay): so close to one, fp32 would round the decay.
    p -= decay * p
    m += rate1 * (g - m)
    v += rate2 * (g * g - v)
    p -= step_size * (m / (tl.sqrt(v) * correction2 + eps))
    tl.store(main + at, p, mask=mask)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    if parameter_type is not None:
        tl.store(parameter + at, p.to(parameter_type), mask=mask)


@triton.jit
def _adamw(
    tensors,
    table,
    factor,
    decay,
    rate1,
    rate2,
    eps,
    step_size,
    correction2,
    gradient_type: tl.constexpr,
    parameter_type: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = table + tl.load(tensors + program).to(tl.int64) * ROW
    main = _pointer(row, 0, tl.float32, ALIGNED)
    gradient = _pointer(row, 1, gradient_type, ALIGNED)
    exp_avg = _pointer(row, 2, tl.float32, ALIGNED)
    exp_avg_sq = _pointer(row, 3, tl.float32, ALIGNED)
    parameter = main
    if parameter_type is not None:
        parameter = _pointer(row, 4, parameter_type, ALIGNED)
    start = (program.to(tl.int64) - tl.load(row + 7)) * CHUNK
    count = tl.minimum(tl.load(row + 5) - start, CHUNK)
    decay = decay * tl.load(row + 6).to(tl.float32)
    scale = tl.load(factor)
    lanes = tl.arange(0, BLOCK)
    # Whole chunks need no mask, which would keep accesses from being vectorised.
    if count == CHUNK:
        for begin in range(0, CHUNK, BLOCK):
            _move(
                start + begin + lanes, None, main, gradient, exp_avg, exp_avg_sq, parameter,
                scale, decay, rate1, rate2, eps, step_size, correction2, parameter_type,
            )  # fmt: skip
    else:
        for begin in range(0, CHUNK, BLOCK):
            _move(
                start + begin + lanes, begin + lanes < count, main, gradient, exp_avg, exp_avg_sq,
                parameter, scale, decay, rate1, rate2, eps, step_size, correction2, parameter_type,
            )  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """One weight of a step: contiguous tensors of as many values on one device.

    main, exp_avg, exp_avg_sq: fp32, moved in place. gradient: fp32, bf16 or fp16. parameter: what
    the new weight is rounded into, if anything. decays: whether weight decay applies.
    """

    main: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    parameter: Tensor | None
    decays: bool

    @property
    def types(self) -> Types:
        """Of the gradient and of the parameter; one launch takes weights of equal ones."""
        return self.gradient.dtype, None if self.parameter is None else self.parameter.dtype

    def addresses(self) -> tuple[int, ...]:
        parameter = 0 if self.parameter is None else self.parameter.data_ptr()
        moments = self.exp_avg.data_ptr(), self.exp_avg_sq.data_ptr()
        return self.main.data_ptr(), self.gradient.data_ptr(), *moments, parameter


class AdamW:
    """Launches the kernel; equal to ``torch.optim.AdamW`` up to rounding, and deterministic."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self._betas, self._eps = betas, eps
        self._programs: dict[tuple[int, ...], Tensor] = {}

    def step(
        self,
        moved: Sequence[Moved],
        count: int,
        factor: Tensor | None,
        lr: float,
        weight_decay: float,
    ) -> None:
        """The ``count``-th step of these weights, at least one, all of equal :attr:`Moved.types`.

        factor: fp32 scalar on the device that gradients are multiplied by (None: 1). lr,
        weight_decay: of this step. The host waits for nothing.
        """
        device = moved[0].main.device
        addresses = [tensor.addresses() for tensor in moved]
        tensors = self._tensors_of_programs(moved)
        if factor is None:
            factor = torch.ones((), device=device)
        (beta1, beta2), (gradient_type, parameter_type) = self._betas, moved[0].types
        with torch.cuda.device_of(moved[0].main):
            _adamw[(len(tensors),)](
                tensors,
                _table(moved, addresses),
                factor,
                lr * weight_decay,
                1.0 - beta1,
                1.0 - beta2,
                self._eps,
                lr / (1.0 - beta1**count),
                1.0 / math.sqrt(1.0 - beta2**count),
                gradient_type=TYPES[gradient_type],
                parameter_type=None if parameter_type is None else TYPES[parameter_type],
                ALIGNED=all(not a % ALIGNMENT.value for row in addresses for a in row),
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )

    def _tensors_of_programs(self, moved: Sequence[Moved]) -> Tensor:
        """int32: the index in ``moved`` of what each program works on. It depends on sizes only,
        and these are the same at every step unless some weights have no gradient."""
        sizes = tuple(tensor.main.numel() for tensor in moved)
        if sizes not in self._programs:
            if len(self._programs) == REMEMBERED:
                self._programs.clear()
            counts = torch.tensor([_programs(size) for size in sizes])
            found = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts)
            self._programs[sizes] = send(found, moved[0].main.device)
        return self._programs[sizes]


def _programs(size: int) -> int:
    return -(-size // CHUNK)


def _table(moved: Sequence[Moved], addresses: Sequence[Sequence[int]]) -> Tensor:
    """int64 [tensors, ROW] on the device, on its way there."""
    values: list[int] = []
    first = 0
    for tensor, own in zip(moved, addresses, strict=True):
        size = tensor.main.numel()
        values += (*own, size, int(tensor.decays), first)
        first += _programs(size)
    return send(torch.tensor(values, dtype=torch.int64), moved[0].main.device)
