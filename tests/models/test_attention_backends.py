"""Attention back-ends: what PyTorch's are limited to, and what packages are handed.

Packages are stand-ins with the real signatures that compute the reference formula; that they
compute the same on a GPU is for ``tests/gpu``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import _registry

from mtk.config.attention_rules import AttentionBackend
from mtk.errors import LayoutError
from mtk.models.attention import (
    CAUSAL,
    EVERYWHERE,
    AttentionKernel,
    Form,
    reference_kernel,
    sdpa_kernel,
)
from mtk.models.attention_backends import TorchKernel, named_kernel, ordered
from mtk.parallel.recompute import RecomputedKernel, recomputed
from tests.models.sizes import llama_config, small_model

CPU = torch.device("cpu")
# The compiler warns about its own look-ups; nothing of it is ours.
COMPILER = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
PACKAGES: tuple[AttentionBackend, ...] = ("flash-attn", "transformer-engine")


def tensors(batch: int = 2, length: int = 12, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two groups."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(batch, heads, length, size, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    return q, k, v


def run(kernel: AttentionKernel, form: Form = CAUSAL) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    q, k, v = tensors()
    out = kernel(q, k, v, mask=None, dropout=0.0, form=form)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    return [out, *grads]


# -- PyTorch's own ------------------------------------------------------------------------


@pytest.mark.parametrize("form", [CAUSAL, EVERYWHERE, Form(window=5)], ids=str)
@pytest.mark.parametrize(
    "kernel",
    [ordered("math"), ordered("flash"), ordered("cudnn", "efficient", "math")],
    ids=["math", "flash", "auto"],
)
def test_torch_kernels_equal_the_formula(kernel: TorchKernel, form: Form) -> None:
    for found, expected in zip(run(kernel, form), run(reference_kernel, form), strict=True):
        torch.testing.assert_close(found, expected)


def test_groups_are_spread_for_the_kernel_that_knows_none() -> None:
    assert ordered("efficient", "math").spreads and not ordered("cudnn", "efficient").spreads
    kernel = ordered("efficient", "math")
    for found, expected in zip(run(kernel), run(reference_kernel), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_that_refuses_is_an_error_and_leaves_torch_as_it_was() -> None:
    before = torch._C._get_sdp_priority_order(), torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(RuntimeError, match=r"No available kernel|No viable backend"):
        run(ordered("cudnn"))
    run(ordered("cudnn", "math", "flash"))
    after = torch._C._get_sdp_priority_order(), torch.backends.cuda.flash_sdp_enabled()
    assert before == after


@COMPILER
@pytest.mark.parametrize(
    "kernel",
    [ordered("cudnn", "flash", "efficient", "math"), ordered("efficient", "math")],
    ids=["cudnn", "efficient"],
)
def test_a_block_is_traced_whole(kernel: TorchKernel) -> None:
    """fullgraph: the order of implementations breaks no graph."""
    plain, traced = small_model(llama_config()), small_model(llama_config(), kernel=kernel)
    for block in traced.layers.values():
        block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    tokens = torch.arange(24)[None]
    losses = [model(tokens).square().mean() for model in (plain, traced)]
    torch.testing.assert_close(*losses)
    for model, loss in zip((plain, traced), losses, strict=True):
        model.zero_grad()
        loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(traced.get_parameter(name).grad, parameter.grad)


@COMPILER
def test_the_order_reaches_the_compiler() -> None:
    """What is traced is the implementation that comes first, not the one torch prefers."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        forward: Callable[..., Any] = graph.forward
        return forward

    kernel = torch.compile(ordered("math", "flash"), backend=backend, fullgraph=True)
    kernel(*tensors(), mask=None, dropout=0.0)
    assert len(graphs) == 1
    assert graphs[0].index("MATH") < graphs[0].index("FLASH")


def test_selective_recomputation_leaves_fused_kernels_alone() -> None:
    for kernel in (ordered("flash"), ordered("cudnn", "math"), named_kernel("sdpa", CPU)):
        kept = kernel if kernel is not sdpa_kernel else RecomputedKernel(sdpa_kernel)
        assert recomputed(kernel) == kept
    assert recomputed(ordered("math")) == RecomputedKernel(ordered("math"))


# -- packages -----------------------------------------------------------------------------


class FakeFlashAttn:
    """flash_attn 2.8's function, as far as it is called here."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        assert q.shape[1:] == (12, 4, 8) and k.shape == v.shape and k.shape[1:] == (12, 2, 8)
        assert softmax_scale is None and not softcap and alibi_slopes is None
        assert not return_attn_probs and (causal or window_size == (-1, -1))
        self.calls.append({"dropout_p": dropout_p, "deterministic": deterministic})
        # Inclusive: a query sees that many tokens before its own.
        before, after = window_size
        assert after == (-1 if before == -1 else 0)
        form = Form(causal, None if before == -1 else before + 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return reference_kernel(q, k, v, mask=None, dropout=0.0, form=form).transpose(1, 2)


class FakeDotProductAttention(torch.nn.Module):
    """Transformer Engine 2's module, as far as it is called here."""

    made = 0

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        type(self).made += 1
        assert qkv_format == "bshd" and attention_dropout in (0.0, 0.25)
        assert attn_mask_type in ("causal", "no_mask")
        self.shapes = [(num_attention_heads, kv_channels), (num_gqa_groups, kv_channels)]
        assert window_size is None or window_size[1] == 0
        window = None if window_size is None else window_size[0] + 1
        self.form = Form(attn_mask_type == "causal", window)

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        inputs = (query_layer, key_layer, value_layer)
        assert all(x.is_contiguous() for x in inputs)
        assert [x.shape[2:] for x in inputs] == [self.shapes[0], self.shapes[1], self.shapes[1]]
        q, k, v = (x.transpose(1, 2) for x in inputs)
        out = reference_kernel(q, k, v, mask=None, dropout=0.0, form=self.form)
        return out.transpose(1, 2).flatten(2)  # the heads side by side, as there


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttn:
    fake, module = FakeFlashAttn(), ModuleType("flash_attn")
    vars(module)["flash_attn_func"] = fake.flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return fake


@pytest.fixture
def packages(flash_attn: FakeFlashAttn, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("transformer_engine.pytorch")
    vars(module)["DotProductAttention"] = FakeDotProductAttention
    monkeypatch.setattr(FakeDotProductAttention, "made", 0)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("form", [CAUSAL, EVERYWHERE, Form(window=5)], ids=str)
@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_get_what_they_want(backend: AttentionBackend, form: Form) -> None:
    found = run(named_kernel(backend, CPU), form)
    for own, expected in zip(found, run(reference_kernel, form), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_know_no_masks_and_keep_no_scores(backend: AttentionBackend) -> None:
    kernel, mask = named_kernel(backend, CPU), torch.ones(12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="knows no masks"):
        kernel(*tensors(), mask=mask, dropout=0.0)
    with pytest.raises(ValueError, match="knows no masks"):
        kernel(*tensors(), mask=None, dropout=0.0, bias=torch.zeros(12, 12))
    assert recomputed(kernel) is kernel


@pytest.mark.usefixtures("packages")
@COMPILER
@pytest.mark.parametrize("backend", PACKAGES)
def test_a_model_with_a_package_compiles_around_it(backend: AttentionBackend) -> None:
    config = llama_config(seq_length=12, hidden_size=32)
    plain = small_model(config)
    model = small_model(config, kernel=named_kernel(backend, CPU))
    for block in model.layers.values():
        block.compile(dynamic=False, backend="aot_eager")
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(model(tokens), plain(tokens))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_flash_attn_follows_the_deterministic_mode(flash_attn: FakeFlashAttn) -> None:
    kernel = named_kernel("flash-attn", CPU)
    kernel(*tensors(), mask=None, dropout=0.25)
    torch.use_deterministic_algorithms(True)
    try:
        kernel(*tensors(), mask=None, dropout=0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash_attn.calls == [
        {"dropout_p": 0.25, "deterministic": False},
        {"dropout_p": 0.0, "deterministic": True},
    ]


@pytest.mark.usefixtures("packages")
def test_a_module_of_transformer_engine_serves_all_layers() -> None:
    kernel = named_kernel("transformer-engine", CPU)
    for dropout in (0.0, 0.25, 0.0):
        for form in (CAUSAL, CAUSAL, Form(window=3)):
            kernel(*tensors(), mask=None, dropout=dropout, form=form)
    assert FakeDotProductAttention.made == 4


@pytest.mark.parametrize(
    ("backend", "module", "words"),
    [
        ("flash-attn", "flash_attn", "package flash-attn "),
        ("transformer-engine", "transformer_engine.pytorch", r"transformer-engine\[pytorch\]"),
        ("flash3", "flash_attn_interface", "folder hopper"),
        ("flash4", "flash_attn.cute.interface", "package flash-attn-4 "),
    ],
)
def test_what_is_not_there_is_named(
    backend: AttentionBackend, module: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LayoutError, match=f"Install the .*{words}.*--attention-backend auto"):
        named_kernel(backend, CPU)


# -- flash attention in another's place ---------------------------------------------------


class Handle:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        log.append(f"+{name}")

    def remove(self) -> None:
        self.log.append(f"-{self.name}")


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was put in flash attention's place (+) and taken away again (-)."""
    log: list[str] = []
    for name in ("FA3", "FA4"):
        make: Callable[[], Handle] = lambda name=name: Handle(name, log)  # noqa: E731
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, make)
    yield log
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()


def test_newer_flash_attentions_serve_until_another_is_asked_for(activated: list[str]) -> None:
    assert named_kernel("flash3", CPU) == ordered("flash")
    assert named_kernel("flash4", CPU) == ordered("flash")
    assert activated == ["+FA3", "-FA3", "+FA4"]
    assert named_kernel("flash", CPU) == ordered("flash")
    assert activated[-1] == "-FA4" and torch_attention.current_flash_attention_impl() is None


def test_they_run_on_their_own_gpus(activated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(LayoutError, match=r"compute capability 9\.0, not 10\.0"):
        named_kernel("flash3", torch.device("cuda"))
    named_kernel("flash4", torch.device("cuda"))
    assert activated == ["+FA4"]
