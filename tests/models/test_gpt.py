"""The model against formulas written out, and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.models.attention import reference_kernel
from mtk.models.count import flops_per_token, parameter_count
from mtk.models.gpt import GPT
from mtk.models.init import initialize, normal_weight
from tests.models.sizes import llama_config, small_config, small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "no-positions": {"position_embedding_type": "none"},
    "rope": {"position_embedding_type": "rope", "rotary_percent": 0.5},
    "gqa": {"num_query_groups": 2},
    "mqa": {"num_query_groups": 1},
    "swiglu-rms": {"activation": "swiglu", "normalization": "RMSNorm"},
    "untied-no-bias": {"untie_embeddings_and_output_weights": True, "add_bias_linear": False},
    "qkv-bias": {"add_bias_linear": False, "add_qkv_bias": True},
    "wide-heads": {"kv_channels": 16},
    "squared-relu": {"activation": "squared-relu"},
    "vocab-multiple": {"vocab_size": 128},
    "window": {"window_size": 5},
    "window-of-itself": {"window_size": 1},
    "interleaved": {"position_embedding_type": "rope", "rotary_interleaved": True},
    "alibi": {"position_embedding_type": "alibi", "embedding_layernorm": True},
    "alibi-window-3-heads": {
        "position_embedding_type": "alibi",
        "window_size": 4,
        "num_attention_heads": 3,
        "kv_channels": 8,
    },
    "relative": {"position_embedding_type": "relative", "relative_attention_num_buckets": 6},
    "norms-of-heads": {"qk_layernorm": True, "num_query_groups": 2},
    "parallel-residual": {"use_parallel_residual": True},
    "gemma": {
        "normalization": "RMSNorm",
        "apply_layernorm_1p": True,
        "scale_embeddings": True,
        "activation": "geglu-tanh",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_attention_bias": True,
    },
    "layernorm-1p": {
        "apply_layernorm_1p": True,
        "activation": "geglu",
        "embedding_layernorm": True,
    },
    "mlp-bias": {"add_bias_linear": False, "add_mlp_bias": True},
    "experts": {"num_experts": 4, "add_bias_linear": False, "moe_ffn_hidden_size": 40},
    "some-experts": {
        "num_experts": 4,
        "moe_router_topk": 1,
        "moe_layer_freq": 2,
        "add_bias_linear": False,
        "activation": "swiglu",
        "moe_expert_capacity_factor": 0.5,
    },
}


def tokens(model: GPT, batch: int = 2, length: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    assert model.config.vocab_size is not None
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_kernel_equals_the_formula(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    fast, plain = small_model(config), small_model(config, kernel=reference_kernel)
    x_BS = tokens(fast)
    assert fast(x_BS).shape == (2, 17, config.vocab_size)
    torch.testing.assert_close(fast(x_BS), plain(x_BS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parameter_count_formula(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    actual = sum(p.numel() for p in small_model(config).parameters())
    assert parameter_count(config) == actual


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_no_token_sees_the_future(changes: dict[str, Any]) -> None:
    model = small_model(small_config(**changes))
    x_BS = tokens(model)
    changed = x_BS.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    before, after = model(x_BS), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 9], after[:, 9], atol=1e-4)


class ListCache:
    """The simplest cache: concatenation."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_token_by_token_with_cache_equals_all_at_once(changes: dict[str, Any]) -> None:
    model = small_model(small_config(**changes))
    x_BS = tokens(model)
    caches = [ListCache() for _ in model.layers]
    pieces = []
    for position in range(x_BS.shape[1]):
        mask = torch.ones(1, position + 1, dtype=torch.bool)
        step = torch.tensor([position])
        pieces.append(model(x_BS[:, position : position + 1], step, mask=mask, caches=caches))
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(x_BS), rtol=1e-4, atol=1e-5)


def test_positions_per_row() -> None:
    model = small_model(llama_config())
    x_BS = tokens(model)
    shared = torch.arange(17)
    torch.testing.assert_close(model(x_BS, shared.expand(2, 17)), model(x_BS, shared))


def test_rope_depends_on_distance_only() -> None:
    model = small_model(llama_config(max_position_embeddings=64))
    x_BS = tokens(model)
    shifted = model(x_BS, torch.arange(17) + 30)
    torch.testing.assert_close(shifted, model(x_BS), rtol=1e-4, atol=1e-5)


def test_initial_weights_depend_on_name_and_seed_only() -> None:
    deep, shallow = small_model(small_config()), small_model(small_config(num_layers=1))
    ours, theirs = dict(deep.named_parameters()), dict(shallow.named_parameters())
    name = "layers.0.attention.query.weight"
    assert torch.equal(ours[name], theirs[name])
    again = small_model(small_config(), seed=2)
    assert not torch.equal(ours[name], dict(again.named_parameters())[name])
    assert ours["layers.1.mlp.down.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert torch.equal(ours["final_norm.weight"], torch.ones(32))
    assert torch.equal(ours["layers.0.mlp.up.bias"], torch.zeros(128))


def test_initial_weight_is_pinned() -> None:
    """Runs can be repeated across versions only while this stays the same."""
    weight = normal_weight("layers.0.mlp.up.weight", torch.Size([2, 2]), 1.0, 1234)
    again = normal_weight("layers.0.mlp.up.weight", torch.Size([2, 2]), 1.0, 1234)
    assert torch.equal(weight, again)
    assert not torch.equal(weight, normal_weight("layers.1.mlp.up.weight", weight.shape, 1.0, 1234))


def test_padded_rows_get_no_gradient() -> None:
    model = small_model(small_config())
    model(tokens(model)).square().sum().backward()
    gradient = model.embedding.tokens.weight.grad
    assert gradient is not None and gradient.shape[0] == 128
    assert not gradient[97:].any() and gradient[:97].any()


def test_dropout_acts_in_training_only() -> None:
    config = small_config(hidden_dropout=0.5, attention_dropout=0.5)
    model = small_model(config)
    x_BS = tokens(model)
    assert torch.equal(model(x_BS), model(x_BS))
    model.train()
    assert not torch.equal(model(x_BS), model(x_BS))


def test_reinitialising_is_idempotent() -> None:
    config = small_config()
    model = small_model(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    initialize(model, config, 1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_flops_of_the_published_1_7b_row() -> None:
    config = small_config(
        num_layers=24,
        hidden_size=2048,
        num_attention_heads=16,
        ffn_hidden_size=8192,
        seq_length=4096,
        vocab_size=131072,
    )
    flops = flops_per_token(config)
    matrices = 24 * 12 * 2048**2 + 131072 * 2048
    assert flops.full == 6 * matrices + 12 * 24 * 2048 * 4096
    assert flops.full - flops.causal == 6 * 24 * 2048 * 4096
