"""FP8 layers: near bf16, the plain casts by formula, rules, and what stays in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.config import make
from mtk.config.bench import BenchConfig
from mtk.config.float8 import Float8Options
from mtk.errors import ConfigError, LayoutError
from mtk.models.gpt import GPT
from mtk.models.mlp import ACTIVATIONS as PLAIN
from mtk.precision.float8 import Scaling, linear
from mtk.precision.float8_casts import (
    ACTIVATIONS,
    GATED,
    PlainCasts,
    activated,
    activated_backward,
    limit,
)
from mtk.precision.float8_history import History
from mtk.precision.float8_layers import LINEAR, Float8Attention, Float8MLP, use_float8
from tests.models.sizes import small_config, small_model

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 64, "seq_length": 32, "activation": "gelu-tanh"}


def options(**changes: Any) -> Float8Options:
    return Float8Options(**{"fp8_format": "hybrid", "fp8_min_size": 16, **changes})


def model_of(**changes: Any) -> GPT:
    return small_model(small_config(**(SIZES | changes))).bfloat16().train()


def gradients(model: GPT) -> tuple[float, dict[str, Tensor]]:
    tokens = (torch.arange(64).view(2, 32) * 7) % 97
    logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())
    loss.backward()
    return loss.item(), {
        n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_follows_bf16(activation: str, bias: bool) -> None:
    changes = {"activation": activation, "add_bias_linear": bias, "num_query_groups": 2}
    plain, fast = model_of(**changes), model_of(**changes)
    use_float8(fast, options(), CPU)
    loss, expected = gradients(plain)
    own, found = gradients(fast)
    assert own == pytest.approx(loss, rel=2e-3) and own != loss
    assert found.keys() == expected.keys()
    # E5M2 has two bits: 7 per cent of a gradient, and a few casts come together. Sums over all
    # tokens that nearly cancel (gradients of biases) have no bound of their own.
    for name, gradient in expected.items():
        if gradient.ndim > 1:
            assert (found[name] - gradient).norm() < 0.25 * gradient.norm(), name
    whole = torch.cat([g.flatten() for g in expected.values()])
    own_whole = torch.cat([found[name].flatten() for name in expected])
    # Kinks (relu) turn some gradients on or off.
    assert (own_whole - whole).norm() < 0.15 * whole.norm()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_and_their_gradients(kind: str) -> None:
    x = torch.randn(5, 12, dtype=torch.double, requires_grad=True)
    if kind in GATED:
        first, second = x.chunk(2, -1)
        expected = PLAIN[kind](first) * second
    else:
        expected = PLAIN[kind](x)
    upstream = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((expected * upstream).sum(), x)
    torch.testing.assert_close(activated(x.detach(), kind), expected.detach())
    torch.testing.assert_close(activated_backward(upstream, x.detach(), kind), grad)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_saturate_and_keep_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e6, -1e6, 1.0, float("nan")]])
    rows, turned, amax = PlainCasts().cast(x, torch.tensor(1.0), dtype)
    assert rows.float()[0, :3].tolist() == [limit(dtype), -limit(dtype), 1.0]
    assert rows.float()[0, 3].isnan() and amax.isnan()
    assert torch.equal(turned.float()[:3], rows.float()[:, :3].t())


def test_each_tensor_uses_the_whole_range() -> None:
    """Scaled by its own magnitude, a tensor's size does not matter; without scaling it would."""
    x = torch.randn(16, 32).bfloat16()
    weight = torch.randn(48, 32).bfloat16()
    scaling = Scaling(options(), PlainCasts(), LINEAR)
    expected = linear(x, weight, None, scaling)
    for size in (1e-6, 1e4):
        found = linear(x * size, weight, None, scaling)
        difference = found.float() / size - expected.float()
        # Rounding the product with the size to bf16 sends some values to other FP8 numbers.
        assert difference.norm() < 0.03 * expected.float().norm()
    exact = x.float() @ weight.float().t()
    assert (expected.float() - exact).norm() < 0.05 * exact.norm()


def test_gradients_of_a_product() -> None:
    x, weight = torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    bias, upstream = torch.randn(48).bfloat16(), torch.randn(32, 48).bfloat16() * 1e-5
    inputs = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    exact = torch.autograd.grad(F.linear(*inputs), inputs, upstream)
    scaling = Scaling(options(), PlainCasts(), LINEAR)
    found = torch.autograd.grad(linear(*inputs, scaling), inputs, upstream)
    for one, other, bound in zip(found, exact, (0.1, 0.1, 1e-2), strict=True):
        assert (one.float() - other.float()).norm() < bound * other.float().norm()


# Dynamo's own doing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_compiles_as_one_graph(recipe: Any) -> None:
    torch._dynamo.reset()
    plain, compiled = model_of(), model_of()
    histories = []
    for model in (plain, compiled):
        use_float8(model, options(fp8_recipe=recipe), CPU)
        if recipe == "delayed":
            histories.append(History([model], options(), CPU))
    for block in compiled.layers.values():
        block.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    loss, expected = gradients(plain)
    own, found = gradients(compiled)
    assert own == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    # Magnitudes are noted in forward and backward alike.
    met = [torch.cat(history._buffers("amax")) for history in histories]
    assert not met or (bool((met[0] > 0).all()) and torch.equal(*met))


def test_first_and_last_layers_stay() -> None:
    model = model_of(num_layers=4)
    chosen = options(num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    use_float8(model, chosen, CPU)
    blocks: list[Any] = list(model.layers.values())
    kinds = [isinstance(block.attention, Float8Attention) for block in blocks]
    assert kinds == [False, True, False, False]
    assert [isinstance(block.mlp, Float8MLP) for block in blocks] == kinds


def test_small_layers_stay() -> None:
    model = model_of()
    use_float8(model, options(fp8_min_size=64), CPU)
    narrow = model_of(num_query_groups=1)  # keys of 16 channels
    use_float8(narrow, options(fp8_min_size=32), CPU)
    blocks: list[Any] = [model.layers["0"], narrow.layers["0"]]
    assert [isinstance(b.attention, Float8Attention) for b in blocks] == [True, False]
    assert [isinstance(b.mlp, Float8MLP) for b in blocks] == [True, True]
    with pytest.raises(ConfigError, match=r"no linear layer has 512 or more.*fp8-min-size"):
        use_float8(model_of(), options(fp8_min_size=512), CPU)


def test_parts_of_odd_sizes_are_refused() -> None:
    with pytest.raises(LayoutError, match="steps of 16"):
        use_float8(model_of(ffn_hidden_size=72), options(), CPU)


def config(**changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        **SIZES,
        "num_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "precision": "bf16",
        "fp8_format": "hybrid",
        "device": "cpu",
        "lr": 1e-2,
    }
    return make(BenchConfig, **(values | changes))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"precision": "fp32"}, "Add --bf16"),
        ({"fp8_format": "none", "fp8_recipe": "delayed"}, "only means something with --fp8"),
        ({"fp8_margin": -1}, "must not be negative"),
        ({"fp8_amax_history_len": 0}, "must be at least 1"),
        ({"seq_length": 24}, "multiple of 16 tokens"),
        ({"family": "bert"}, "is for decoders"),
    ],
)
def test_rules(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        config(**changes)
