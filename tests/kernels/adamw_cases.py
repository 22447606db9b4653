"""The AdamW kernel beside torch's AdamW, on any device: CUDA, or the CPU under Triton's
interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtk.config import make
from mtk.config.optimization import OptimizerConfig
from mtk.parallel.grads import total_norm
from mtk.precision.main_weights import MainWeights
from mtk.training.optimizer import Optimizer, decays

# Odd ones, less than a block, more than a chunk, matrices (which decay), and nothing.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1,),
    (3,),
    (1023,),
    (1024 * 5 + 7,),
    (8192 * 2 + 1,),
    (8192,),
    (64, 64),
    (41, 301),
    (0, 8),
)
LR, DECAY = 1e-2, 0.1


@dataclass(frozen=True)
class Case:
    """How weights are held (``dtype`` of the parameters) and what gradients come; unaligned: each
    tensor begins one value behind an address that is well aligned. missing: steps and indices of
    weights that get no gradient."""

    dtype: torch.dtype
    gradient: torch.dtype
    clip: float = 0.5
    loss_scale: float = 1.0
    unaligned: bool = False
    missing: Sequence[tuple[int, int]] = ()

    def __str__(self) -> str:
        place = " unaligned" if self.unaligned else ""
        missing = " some missing" if self.missing else ""
        names = str(self.dtype).removeprefix("torch."), str(self.gradient).removeprefix("torch.")
        return f"{' '.join(names)} clip {self.clip} scale {self.loss_scale}{place}{missing}"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    Case(BF16, BF16),
    Case(BF16, FP32),
    Case(BF16, BF16, unaligned=True),
    Case(BF16, BF16, clip=0.0),
    Case(FP16, FP16, loss_scale=1024.0),
    Case(FP16, FP16, clip=0.0, loss_scale=8.0),
    Case(FP32, FP32),
    Case(FP32, FP32, unaligned=True),
    Case(BF16, BF16, missing=((0, 2), (1, 7), (3, 7))),
)


def random(
    shape: Sequence[int], seed: int, dtype: torch.dtype, device: torch.device, unaligned: bool
) -> Tensor:
    """The same values on every device, and wherever they lie there."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    start = int(unaligned)
    room = torch.zeros(values.numel() + 1, dtype=dtype, device=device)
    return room[start : start + values.numel()].view(*shape).copy_(values)


class Trained:
    """Weights, and an optimizer that moves them by given gradients."""

    def __init__(self, case: Case, device: torch.device, fused: bool) -> None:
        self.case, self.device = case, device
        weights = {
            f"weight{index}": nn.Parameter(self._on_device(shape, index, FP32))
            for index, shape in enumerate(SHAPES)
        }
        self.main = MainWeights(weights, case.dtype)
        self.parameters = weights
        config = make(OptimizerConfig, lr=LR, weight_decay=DECAY, clip_grad=case.clip)
        self.optimizer = Optimizer(self.main, config, fused=fused)

    def _on_device(self, shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
        return random(shape, seed, dtype, self.device, self.case.unaligned)

    @property
    def exact_rounding(self) -> bool:
        """Triton's interpreter cuts fp32 off to bf16; compiled kernels round."""
        return self.device.type == "cuda" or self.case.dtype != BF16 or not self.optimizer.fused

    def step(self, step: int) -> None:
        self.main.clear_gradients()
        for index, shape in enumerate(SHAPES):
            if (step, index) not in self.case.missing:
                gradient = self._on_device(shape, 100 * step + index + 50, self.case.gradient)
                self.main.gradients[f"weight{index}"] = gradient
        found = [g for g in self.main.gradients.values() if g is not None]
        norm = total_norm(found, self.device) / self.case.loss_scale
        self.optimizer.step(norm, self.case.loss_scale, LR / (step + 1), DECAY)


class Exact:
    """AdamW by its formula in fp64, from the same weights and gradients as ``like``."""

    def __init__(self, like: Trained) -> None:
        self.case = like.case
        self.weights = {n: w.detach().cpu().double() for n, w in like.main.weights.items()}
        self.moments = {n: (w * 0, w * 0) for n, w in self.weights.items()}
        self.counts = dict.fromkeys(self.weights, 0)

    def step(self, step: int) -> None:
        gradients: dict[str, Tensor] = {}
        for index, shape in enumerate(SHAPES):
            if (step, index) not in self.case.missing:
                seed = 100 * step + index + 50
                gradient = random(shape, seed, self.case.gradient, torch.device("cpu"), False)
                gradients[f"weight{index}"] = gradient.double() / self.case.loss_scale
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        factor = min(1.0, self.case.clip / (norm + 1e-6)) if self.case.clip else 1.0
        options = make(OptimizerConfig, lr=LR)
        beta1, beta2 = options.adam_beta1, options.adam_beta2
        for name, gradient in gradients.items():
            weight, (first, second) = self.weights[name], self.moments[name]
            count = self.counts[name] = self.counts[name] + 1
            lr, scaled = LR / (step + 1), gradient * factor
            weight.mul_(1.0 - lr * (DECAY if decays(name, weight) else 0.0))
            first.lerp_(scaled, 1.0 - beta1)
            second.lerp_(scaled.square(), 1.0 - beta2)
            root = (second / (1.0 - beta2**count)).sqrt() + options.adam_eps
            weight.sub_(lr / (1.0 - beta1**count) * first / root)


def check_exact(one: Trained, exact: Exact) -> None:
    """Weights and moments are those of the formula, to fp32's rounding in a few steps."""
    state = one.optimizer.state_tensors()
    for name, weight in exact.weights.items():
        own = one.main.weights[name].detach().cpu().double()
        torch.testing.assert_close(own, weight, rtol=1e-6, atol=3e-7, msg=name)
        if exact.counts[name]:
            second = state[f"exp_avg_sq.{name}"].cpu().double()
            # The norm that they are clipped by is a sum in fp32, and enters squared.
            torch.testing.assert_close(second, exact.moments[name][1], rtol=1e-5, atol=0, msg=name)


def check_equal(one: Trained, other: Trained) -> None:
    """State up to rounding, parameters rounded from what it is."""
    # On CUDA torch takes 1 - beta2 from an fp32 beta2, which is off by 5e-5.
    second = 1e-4 if one.device.type == "cuda" else 2e-6
    for name, weight in one.main.weights.items():
        near = 1e-6 if one.device.type == "cuda" else 2e-7
        torch.testing.assert_close(weight, other.main.weights[name], rtol=1e-6, atol=near)
        if one.exact_rounding:
            assert torch.equal(one.parameters[name], weight.to(one.case.dtype)), name
        else:
            torch.testing.assert_close(one.parameters[name].float(), weight, rtol=2**-7, atol=0)
    found, expected = one.optimizer.state_tensors(), other.optimizer.state_tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        there = expected[name]
        tensor = tensor.to(there.device)
        if name.startswith("step."):
            assert torch.equal(tensor, there), name
        else:
            # Averages of both signs cancel, those of squares do not.
            cancels = name.startswith("exp_avg.") and there.numel()
            atol = 2e-7 * there.abs().max().item() if cancels else 0.0
            rtol = second if name.startswith("exp_avg_sq.") else 2e-6
            torch.testing.assert_close(tensor, there, rtol=rtol, atol=atol, msg=name)


def check_steps(case: Case, device: torch.device) -> None:
    """Five steps, compared after each with torch's and with the formula."""
    fused, plain = Trained(case, device, True), Trained(case, device, False)
    exact = Exact(fused)
    for step in range(5):
        for subject in (fused, plain, exact):
            subject.step(step)
        check_equal(fused, plain)
        check_exact(fused, exact)


def check_state_passes(device: torch.device, first: bool, then: bool) -> None:
    """What one of the updates (``fused`` or not) has saved, the other goes on with."""
    case = Case(BF16, BF16)
    saved, expected = Trained(case, device, first), Trained(case, device, then)
    for step in range(2):
        saved.step(step)
        expected.step(step)
    resumed = Trained(case, device, then)
    state = {name: tensor.cpu() for name, tensor in saved.optimizer.state_tensors().items()}
    assert sorted(state) == sorted(saved.optimizer.state_names())
    for name, weight in saved.main.weights.items():
        resumed.main.restore(name, weight.detach().cpu())
    resumed.optimizer.restore(state)
    for step in range(2, 4):
        resumed.step(step)
        expected.step(step)
    check_equal(resumed, expected)


def check_repeats(device: torch.device) -> None:
    """The same bits each time."""
    runs = []
    for _ in range(2):
        trained = Trained(Case(BF16, BF16), device, True)
        for step in range(3):
            trained.step(step)
        runs.append(trained.main.weights)
    assert all(torch.equal(weight, runs[1][name]) for name, weight in runs[0].items())
