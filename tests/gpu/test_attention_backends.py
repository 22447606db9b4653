"""Attention back-ends on CUDA in bf16 against the formula, and the measured choice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.models.attention import CAUSAL, EVERYWHERE, Form, reference_kernel
from mtk.models.attention_backends import TorchKernel, ordered
from mtk.parallel.ranks import Ranks
from mtk.training.attention_choice import (
    Work,
    attention_kernel,
    device_seconds,
    measured,
    order_of_preference,
    work_of,
)
from tests.gpu.test_training import losses
from tests.models.sizes import llama_config, small_model

# The compiler and torch's own reasons against a kernel; nothing of it is ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
CUDA = torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
NAMES = ("cudnn", "flash", "efficient", "math")
TAKES_MASKS = ("cudnn", "efficient", "math")
RUN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "seq_length": 4096,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "mock_data": True,
    "vocab_size": 64,
    "train_iters": 1,
    "save": "unused",
    "lr": 1e-3,
    "precision": "bf16",
    "device": "cuda",
    "compile": False,
}


def inputs(size: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, 256, size, generator=generator) for h in (8, groups, groups))
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def both(size: int, groups: int, kernel: TorchKernel, **settings: Any) -> None:
    """Output and gradients of ``kernel`` in bf16 beside those of the formula in fp32."""
    sides = []
    for moved, run in ((torch.float32, reference_kernel), (torch.bfloat16, kernel)):
        q, k, v = (x.to(CUDA, moved).requires_grad_() for x in inputs(size, groups))
        bias = settings.get("bias")
        given = settings | {"bias": None if bias is None else bias.to(CUDA, moved)}
        out = run(q, k, v, mask=None, dropout=0.0, **given)
        sides.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for expected, found in zip(*sides, strict=True):
        assert (found.float() - expected).abs().max() <= 3e-2 * expected.abs().max()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("form", [CAUSAL, EVERYWHERE], ids=["causal", "everywhere"])
@pytest.mark.parametrize("backend", NAMES)
def test_equals_the_formula(backend: str, form: Form, groups: int, size: int) -> None:
    both(size, groups, ordered(backend), form=form)


@pytest.mark.parametrize("kind", ["window", "documents", "bias"])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("backend", [*TAKES_MASKS, "auto"])
def test_masks_equal_the_formula(backend: str, groups: int, kind: str) -> None:
    """ "auto": cuDNN first, and what takes the mask where it does not."""
    kernel = ordered(*NAMES) if backend == "auto" else ordered(backend)
    settings: dict[str, Any] = {"form": Form(window=40) if kind == "window" else CAUSAL}
    if kind == "documents":
        settings["documents"] = (torch.arange(256, device=CUDA) // 50).expand(2, -1)
    if kind == "bias":
        bias = torch.randn(1, 8, 256, 256, generator=torch.Generator().manual_seed(1))
        settings["bias"] = bias.bfloat16().float()
    both(64, groups, kernel, **settings)


def test_a_learned_bias_is_never_left_without_its_gradient() -> None:
    form = EVERYWHERE
    work = Work(2, 8, 8, 256, 64, torch.bfloat16, form, bias=True, learned=True)
    found = measured(work, CUDA, NAMES, device_seconds)
    assert "efficient" in found and "flash" not in found


def test_the_choice_is_quick_and_leaves_no_trace() -> None:
    config = make(PretrainConfig, **RUN)
    torch.zeros(1, device=CUDA)
    before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    begun = time.perf_counter()
    chosen = attention_kernel(config, Ranks(device=CUDA))
    seconds = time.perf_counter() - begun
    print(f"{chosen}; the choice took {seconds:.2f} s")
    assert seconds < 2
    assert chosen.backend in chosen.seconds and chosen.backend in ("cudnn", "flash", "efficient")
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), state)
    favourite = order_of_preference(torch.cuda.get_device_capability())[0]
    if favourite in chosen.seconds:
        assert chosen.seconds[chosen.backend] <= chosen.seconds[favourite]


def test_large_sequences_do_not_take_long() -> None:
    config = make(PretrainConfig, **RUN | {"seq_length": 65536, "micro_batch_size": 2})
    begun = time.perf_counter()
    found = measured(work_of(config), CUDA, ("cudnn", "flash", "efficient"), device_seconds)
    assert found and time.perf_counter() - begun < 3


# What the names of an implementation's kernels contain.
OWN = {"cudnn": "cudnn", "flash": "pytorch_flash"}


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_chosen_is_what_runs(compiled: bool, backend: str) -> None:
    """Forward and backward, with all others behind it in the order."""
    if backend == "cudnn" and not HOPPER:
        pytest.skip("cuDNN names its kernels so from Hopper on")
    rest = [name for name in NAMES if name != backend]
    config = llama_config(hidden_size=256, num_attention_heads=4, seq_length=256)
    model = small_model(config, kernel=ordered(backend, *rest)).to(CUDA, torch.bfloat16).train()
    for block in model.layers.values():
        if compiled:
            block.compile(dynamic=False, fullgraph=True)
    tokens = torch.arange(256, device=CUDA).remainder(97)[None]
    model(tokens).float().square().mean().backward()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        model(tokens).float().square().mean().backward()
        torch.cuda.synchronize()
    on_device = [e.name.lower() for e in seen.events() if e.device_type == DeviceType.CUDA]
    counts = {name: sum(own in kernel for kernel in on_device) for name, own in OWN.items()}
    other = next(name for name in OWN if name != backend)
    assert counts[backend] >= 2 * len(model.layers) and counts[other] == 0, sorted(set(on_device))


@pytest.mark.parametrize("backend", ["auto", "cudnn", "efficient", "math"])
def test_a_training_step_in_each(backend: str, tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", precision="bf16", attention_backend="sdpa")
    own = losses(tmp_path / "own", precision="bf16", attention_backend=backend)
    assert own == pytest.approx(plain, rel=1e-2)
