"""Mamba and hybrid models: initial values, decay, counts, documents, kernels from outside."""

from __future__ import annotations

import dataclasses
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.errors import LayoutError
from mtk.models.build import build_model
from mtk.models.causal_conv import convolve
from mtk.models.count import flops_per_token, layer_costs, parameter_count
from mtk.models.gpt import GPT
from mtk.models.init import initial_value
from mtk.models.mamba import Mamba
from mtk.models.mamba_kernels import use_kernels
from mtk.models.ssd import chunked
from mtk.training.optimizer import decays
from tests.models.mamba_sizes import hybrid_config, mamba_config
from tests.models.sizes import small_model

MOE = {"hybrid_layer_pattern": "ME*-", "hidden_size": 32, "num_experts": 4}
CONFIGS = {
    "mamba": mamba_config(),
    "biases": mamba_config(add_bias_linear=True, mamba_conv_bias=False, normalization="LayerNorm"),
    "hybrid": hybrid_config(activation="swiglu", untie_embeddings_and_output_weights=True),
    "hybrid-biases": hybrid_config(add_bias_linear=True, position_embedding_type="learned"),
    "experts": hybrid_config(**MOE),
    "gemma-like": hybrid_config(
        apply_layernorm_1p=True,
        qk_layernorm=True,
        window_size=5,
        add_attention_bias=True,
        activation="geglu-tanh",
        position_embedding_type="rope",
        kv_channels=8,
    ),
    "mlp-bias": hybrid_config(add_mlp_bias=True, position_embedding_type="relative"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted(name: str) -> None:
    config = CONFIGS[name]
    held = sum(p.numel() for p in build_model(config).parameters())
    assert parameter_count(config) == held


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_six_times_the_matrices_and_the_rest(name: str) -> None:
    config = CONFIGS[name]
    matrices, tables = 0, ("embedding", "relative")
    for key, parameter in build_model(config).named_parameters():
        if parameter.ndim > 1 and "conv_" not in key and not key.startswith(tables):
            share = 2 / 4 if ".experts." in key else 1.0  # two of four a token
            matrices += int(share * parameter.numel())
    if not config.untie_embeddings_and_output_weights:
        matrices += config.padded_vocab_size * config.hidden_size
    pattern = config.hybrid_layer_pattern or ""
    scan = pattern.count("M") * 3 * 7 * (12 * 6) * 10
    width = config.num_attention_heads * config.head_size
    scores = pattern.count("*") * 12 * width * config.seq_length
    window = config.window_size or config.seq_length
    seen = (window - window**2 / (2 * config.seq_length)) / config.seq_length
    flops = flops_per_token(config)
    assert flops.full == 6 * matrices + scan + scores
    assert flops.causal == pytest.approx(6 * matrices + scan + scores * seen, rel=1e-12)
    output = 6 * config.padded_vocab_size * config.hidden_size
    assert sum(layer_costs(config)) + output == pytest.approx(flops.causal, rel=1e-12)


def test_published_sizes() -> None:
    published = mamba_config(
        hybrid_layer_pattern="M" * 24, hidden_size=768, mamba_num_heads=None, mamba_head_dim=64,
        mamba_num_groups=1, mamba_state_dim=128, vocab_size=50277, make_vocab_size_divisible_by=16,
    )  # fmt: skip
    assert parameter_count(published) == 128_989_632  # state-spaces/mamba2-130m


def test_initial_values_depend_on_names_and_the_seed() -> None:
    config = mamba_config(
        mamba_num_heads=600, mamba_dt_range=(1e-3, 0.1), mamba_dt_floor=2e-3, mamba_a_range=(1, 16)
    )

    def value(part: str, *shape: int, layer: int = 0, seed: int = 1) -> Tensor:
        return initial_value(f"layers.{layer}.mamba.{part}", shape, config, seed)

    rates = value("a_log", 600).exp()
    assert 1 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16
    steps = torch.nn.functional.softplus(value("dt_bias", 600))
    assert steps.min() == pytest.approx(2e-3, rel=1e-3)
    assert 0.09 < steps.max() < 0.1001
    assert 0.08 < (steps > 0.05).float().mean() < 0.22  # 0.15 of a log-uniform draw
    assert (value("skip", 600) == 1).all()
    weights = value("conv_b.weight", 30, 4)
    assert weights.abs().max() <= 0.5 and weights.std() == pytest.approx(0.5 / 3**0.5, rel=0.15)
    zero_centred = dataclasses.replace(config, apply_layernorm_1p=True)
    assert (initial_value("layers.0.mamba.norm.weight", (30,), zero_centred, 1) == 1).all()
    assert not value("conv_b.bias", 30).any() and (value("norm.weight", 30) == 1).all()
    assert torch.equal(rates, value("a_log", 600).exp())
    assert not torch.equal(rates, value("a_log", 600, layer=1).exp())
    assert not torch.equal(rates, value("a_log", 600, seed=2).exp())
    # One branch a layer: the residual stream grows as in a transformer of half as many layers.
    out = value("output.weight", 36, 3600)
    assert out.std() == pytest.approx(0.02 / 2**0.5, rel=0.02)


def test_what_decays() -> None:
    """Matrices and convolutions; not rates, steps, skips, norms or biases (as the authors do)."""
    names = {
        name.removeprefix("layers.0.mamba.")
        for name, parameter in build_model(CONFIGS["mamba"]).named_parameters()
        if name.startswith("layers.0.mamba.") and not decays(name, parameter)
    }
    biases = {"conv_input.bias", "conv_b.bias", "conv_c.bias"}
    assert names == {"a_log", "dt_bias", "skip", "norm.weight"} | biases


BOUNDS = (0, 3, 4, 11, 24)


@pytest.mark.parametrize(
    "config",
    [
        mamba_config(),
        hybrid_config(),
        hybrid_config(position_embedding_type="alibi"),
        hybrid_config(position_embedding_type="relative"),
    ],
    ids=["mamba", "hybrid", "alibi", "relative"],
)
def test_packed_documents_equal_separate_ones(config: ModelConfig) -> None:
    model = small_model(dataclasses.replace(config, init_method_std=0.3))
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(2, 24, dtype=torch.int64)
    for number, (start, end) in enumerate(pairwise(BOUNDS)):
        documents[:, start:end] = number
    packed = model(tokens, documents=documents)
    parts = [model(tokens[:, start:end]) for start, end in pairwise(BOUNDS)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, model(tokens), atol=1e-3)


def test_later_tokens_change_nothing() -> None:
    model = small_model(hybrid_config(init_method_std=0.3))
    tokens = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 15:] = (other[:, 15:] + 1) % 97
    before, after = model(tokens)[:, :15], model(other)[:, :15]
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


class Fakes:
    """The packages' functions by their documented signatures, computed in plain PyTorch."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def causal_conv1d_fn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        self.calls.append("conv")
        assert activation == "silu" and not return_final_states and final_states_out is None
        # The kernels read packed documents from channels that lie side by side only.
        assert x.stride(1) == 1 and (seq_idx is None or seq_idx.dtype == torch.int32)
        before = None if initial_states is None else initial_states.transpose(1, 2)
        out = convolve(x.transpose(1, 2), weight, bias, before=before, documents_BS=seq_idx)
        return out.transpose(1, 2)

    def mamba_chunk_scan_combined(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_softplus: bool = False,
        return_final_states: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append("scan")
        assert D is not None and z is None and dt_bias is None and not dt_softplus and not others
        assert return_final_states and (seq_idx is None or seq_idx.dtype == torch.int32)
        return chunked(
            x, dt, A, B, C, D, chunk=chunk_size, documents_BS=seq_idx, state=initial_states
        )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    found = Fakes()
    convolution = ModuleType("causal_conv1d")
    scan = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    vars(convolution)["causal_conv1d_fn"] = found.causal_conv1d_fn
    vars(scan)["mamba_chunk_scan_combined"] = found.mamba_chunk_scan_combined
    for module in (convolution, scan):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_from_outside_get_what_they_want(fakes: Fakes, packed: bool) -> None:
    model = small_model(hybrid_config(init_method_std=0.3))
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(24).div(7, rounding_mode="floor").expand(2, -1) if packed else None
    plain = model(tokens, documents=documents)
    use_kernels(model, "mamba-ssm")
    torch.testing.assert_close(model(tokens, documents=documents), plain)
    assert fakes.calls == ["conv", "conv", "conv", "scan"] * 2


def test_kernels_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(LayoutError, match=r"causal_conv1d\.causal_conv1d_fn cannot be imported"):
        use_kernels(small_model(mamba_config()), "mamba-ssm")
    model: GPT = small_model(mamba_config())
    use_kernels(model, "torch")
    layers = [m for m in model.modules() if isinstance(m, Mamba)]
    assert len(layers) == 2 and all(layer.kernels.scan is chunked for layer in layers)
