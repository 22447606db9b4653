"""Rotation, windows and biases on scores against transformers, formulas and golden values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.errors import ConfigError
from mtk.models import attention
from mtk.models.attention import Form, form_mask
from mtk.models.gpt import GPT
from mtk.models.norm import make_norm
from mtk.models.relative import RelativeBias, bucket_of
from mtk.models.rotary import frequencies, rotary_table, rotate
from mtk.models.score_bias import alibi_slopes
from tests.models.sizes import llama_config, small_config, small_model
from tests.models.test_gpt import ListCache, tokens

LLAMA3 = {"rope_scaling_type": "llama3", "rotary_base": 5e5, "kv_channels": 64}
YARN = {"rope_scaling_type": "yarn", "rope_original_max_positions": 40, "kv_channels": 32}
SCALED: dict[str, dict[str, Any]] = {
    "default": {"rotary_base": 1e6},
    "linear": {"rope_scaling_type": "linear", "rope_scaling_factor": 2.5},
    "llama-3.1": {**LLAMA3, "rope_scaling_factor": 8.0},
    "llama-3.2": {**LLAMA3, "rope_scaling_factor": 32.0},
    "llama3-other": {
        **LLAMA3,
        "rope_low_freq_factor": 2.0,
        "rope_high_freq_factor": 3.0,
        "rope_original_max_positions": 100,
    },
    "yarn": {**YARN},
    "yarn-not-rounded": {
        **YARN,
        "yarn_truncate": False,
        "yarn_beta_fast": 8.0,
        "yarn_beta_slow": 0.5,
        "yarn_attention_factor": 1.7,
    },
    "yarn-one-channel": {**YARN, "rope_original_max_positions": 2, "kv_channels": 2},
}


def as_transformers(config: ModelConfig) -> Any:
    """The same rotation, computed by transformers."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from mtk.convert.rope import write_rope

    foreign = llama.LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.positions,
        rope_parameters=write_rope(config)["rope_parameters"],
    )
    return llama.LlamaRotaryEmbedding(foreign)


@pytest.mark.parametrize("changes", SCALED.values(), ids=SCALED)
def test_frequencies_are_those_of_transformers(changes: dict[str, Any]) -> None:
    config = llama_config(**changes, max_position_embeddings=200)
    theirs = as_transformers(config)
    torch.testing.assert_close(frequencies(config), theirs.inv_freq, rtol=2e-7, atol=0)
    cos, sin = theirs(torch.zeros(1), torch.arange(200)[None])
    ours = rotary_table(config)
    torch.testing.assert_close(ours[0], cos[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(ours[1], sin[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("factor", "slowest"), [(8.0, 8), (32.0, 32)])
def test_the_factor_arrives(factor: float, slowest: int) -> None:
    """Megatron-LM scales by 8 whatever is asked for."""
    plain = frequencies(llama_config(rotary_base=5e5, kv_channels=64))
    changes = {**LLAMA3, "rope_scaling_factor": factor}
    scaled = frequencies(llama_config(**changes))
    ratio = plain / scaled
    # Wavelengths up to 2048 stay as they are, those from 8192 on are scaled in full.
    assert torch.equal(scaled[:15], plain[:15])
    assert ratio[18:].tolist() == pytest.approx([slowest] * 14)
    assert 1 < ratio[15] < ratio[16] < ratio[17] < slowest


def test_megatron_switch_is_llama_3() -> None:
    config = llama_config(rope_scaling_type="llama3")
    assert config.rope_original_positions == 8192 and config.rope_scaling_factor == 8.0
    stated = llama_config(rope_scaling_type="llama3", rope_original_max_positions=8192)
    assert torch.equal(frequencies(config), frequencies(stated))


def test_interleaved_rotation_is_a_permutation() -> None:
    config = llama_config(kv_channels=12, rotary_percent=0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 24, 12, generator=generator)
    halves = rotate(x, *rotary_table(config))
    order = torch.tensor([0, 3, 1, 4, 2, 5, *range(6, 12)])
    paired = llama_config(kv_channels=12, rotary_percent=0.5, rotary_interleaved=True)
    found = rotate(x[..., order], *rotary_table(paired), interleaved=True)
    torch.testing.assert_close(found, halves[..., order])


# -- windows ----------------------------------------------------------------------------


def test_a_window_is_that_of_transformers() -> None:
    masks = pytest.importorskip("transformers.masking_utils")
    overlay, causal = masks.sliding_window_overlay(3), masks.causal_mask_function
    expected = [[causal(0, 0, q, k) and overlay(0, 0, q, k) for k in range(7)] for q in range(7)]
    found = form_mask(7, Form(window=3), torch.device("cpu"))
    assert found.tolist() == expected
    assert found.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("kind", ["rope", "alibi"])
def test_what_left_the_window_changes_nothing(kind: str) -> None:
    """Two layers of 3 tokens reach 4 back."""
    model = small_model(small_config(position_embedding_type=kind, window_size=3))
    x_BS = tokens(model)
    changed = x_BS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 97
    before, after = model(x_BS), model(changed)
    same = ((before - after).abs().amax(dim=(0, 2)) < 1e-6).tolist()
    assert same == [True] * 5 + [False] * 5 + [True] * 7


def continued(model: GPT, x_BS: Tensor, cuts: list[int], pad: int = 0) -> Tensor:
    """A prompt in pieces into caches, after ``pad`` tokens of padding on the left."""
    caches = [ListCache() for _ in model.layers]
    padding = torch.full((x_BS.shape[0], pad), 3)
    padded = torch.cat((padding, x_BS), dim=1)
    places = torch.arange(padded.shape[1]) - pad
    pieces, start = [], 0
    for end in (*cuts, padded.shape[1]):
        mask = places[None, :end] <= places[start:end, None]
        mask &= (places[None, :end] >= 0) | (places[None, :end] == places[start:end, None])
        pieces.append(
            model(
                padded[:, start:end],
                places[start:end].clamp(min=0),
                mask=mask,
                caches=caches,
                key_positions=places[:end],
            )
        )
        start = end
    return torch.cat(pieces, dim=1)[:, pad:]


LOOKING: dict[str, dict[str, Any]] = {
    "window": {"position_embedding_type": "rope", "window_size": 4},
    "learned-window": {"window_size": 2},
    "alibi": {"position_embedding_type": "alibi"},
    "alibi-window": {"position_embedding_type": "alibi", "window_size": 5},
    "relative": {"position_embedding_type": "relative", "relative_attention_num_buckets": 4},
}


@pytest.mark.parametrize("changes", LOOKING.values(), ids=LOOKING)
@pytest.mark.parametrize("pad", [0, 3])
def test_prompts_padded_and_continued(changes: dict[str, Any], pad: int) -> None:
    model = loud(small_config(**changes))
    x_BS = tokens(model)
    found = continued(model, x_BS, [pad + 6, pad + 7], pad)
    torch.testing.assert_close(found, model(x_BS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", LOOKING.values(), ids=LOOKING)
def test_rows_at_different_places(changes: dict[str, Any]) -> None:
    """Keys lie at their positions; each row of a decode step has its own place."""
    from serving.generation import Decoder

    model = loud(small_config(**changes))
    x_BS = tokens(model)
    with torch.inference_mode():
        decoder = Decoder(model)
        for row, length in enumerate((4, 11)):
            decoder.cache.add_row()
            decoder.prefill(row, x_BS[row, :length].tolist())
        for step in range(5):
            found = decoder.decode([int(x_BS[0, 4 + step]), int(x_BS[1, 11 + step])])
            for row, length in enumerate((5 + step, 12 + step)):
                expected = model(x_BS[row : row + 1, :length])[0, -1]
                torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", LOOKING.values(), ids=LOOKING)
def test_packed_documents_see_themselves_only(changes: dict[str, Any]) -> None:
    model = loud(small_config(**changes))
    x_BS = tokens(model, length=16)
    documents = torch.tensor([0] * 7 + [1] * 9).expand(2, 16)
    positions = torch.cat((torch.arange(7), torch.arange(9))).expand(2, 16)
    found = model(x_BS, positions, documents=documents)
    apart = torch.cat((model(x_BS[:, :7]), model(x_BS[:, 7:])), dim=1)
    torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)


def loud(config: ModelConfig) -> GPT:
    """Weights and biases large enough for scores to matter."""
    model = small_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def test_heads_spread_for_cuda_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama_config(window_size=4)
    expected = small_model(config)(torch.arange(20)[None])
    monkeypatch.setattr(attention, "spreads_groups", lambda q, k, mask: mask is not None)
    found = small_model(config)(torch.arange(20)[None])
    torch.testing.assert_close(found, expected)


# -- biases -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 17])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    expected = bloom._get_alibi_slopes(heads, torch.device("cpu"))
    torch.testing.assert_close(alibi_slopes(heads), expected, rtol=1e-6, atol=0)


def test_slopes_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (32, 17), (4, 9), (10, 300)])
def test_buckets_are_those_of_transformers(bidirectional: bool, buckets: int, far: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    gaps = torch.arange(-400, 401)
    found = bucket_of(gaps, buckets=buckets, max_distance=far, bidirectional=bidirectional)
    expected = t5.T5Attention._relative_position_bucket(-gaps, bidirectional, buckets, far)
    assert torch.equal(found, expected)


def test_relative_biases_take_the_head_dimension() -> None:
    bias = RelativeBias(3, 8, 20, bidirectional=True)
    with torch.no_grad():
        bias.weight.copy_(torch.arange(24.0).view(8, 3))
    gaps = torch.arange(5)[:, None] - torch.arange(6)[None, :]
    found = bias(gaps[None, None])
    assert found.shape == (1, 3, 5, 6)
    number = bucket_of(gaps, buckets=8, max_distance=20, bidirectional=True)
    assert torch.equal(found[0, 2], number * 3.0 + 2)


# -- norms ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_around_zero(kind: str, dtype: torch.dtype) -> None:
    config = small_config(normalization=kind, apply_layernorm_1p=True, norm_epsilon=1e-3)
    ours, plain = make_norm(config), make_norm(small_config(normalization=kind, norm_epsilon=1e-3))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.full((32,), 2.0**-9)
    with torch.no_grad():
        ours.weight.copy_(weight)
        plain.weight.copy_(1 + weight)
    found = ours.to(dtype)(x)
    assert found.dtype == dtype
    # 1 + 2^-9 does not exist in bf16.
    torch.testing.assert_close(found, plain(x.float()).to(dtype), rtol=1e-6, atol=1e-6)


def test_gemma_norm_and_embedding_in_bf16() -> None:
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    config = llama_config(apply_layernorm_1p=True, scale_embeddings=True, hidden_size=24)
    theirs = gemma.GemmaRMSNorm(24, eps=1e-5).bfloat16()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(make_norm(config).bfloat16()(x), theirs(x))
    model = small_model(config).bfloat16()
    assert model.embedding is not None
    scaled = gemma.GemmaTextScaledWordEmbedding(128, 24, 0, embed_scale=24**0.5).bfloat16()
    scaled.weight.data.copy_(model.embedding.tokens.weight.data)
    x_BS = torch.arange(20)[None]
    assert torch.equal(model.embedding(x_BS, x_BS), scaled(x_BS))


# -- rules ------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"window_size": 0}, "at least 1: a token looks at itself. Nearest: 1"),
    ({"window_size": -3}, "at least 1"),
    ({"position_embedding_type": "rope", "rope_scaling_type": "dynamic"}, "must be one of"),
    ({"position_embedding_type": "alibi", "rope_scaling_type": "linear"}, "only means something"),
    ({"rope_scaling_factor": 4.0}, "rope_scaling_type = linear or llama3 or yarn"),
    ({"position_embedding_type": "rope", "yarn_beta_fast": 3.0}, "rope_scaling_type = yarn"),
    ({**LLAMA3, "rope_scaling_factor": 0.5}, "at least 1 and finite. Nearest: 1.0"),
    ({**LLAMA3, "rope_scaling_factor": float("nan")}, "at least 1 and finite"),
    ({**LLAMA3, "rope_low_freq_factor": 4.0}, "greater than rope_low_freq_factor = 4"),
    ({**LLAMA3, "rope_low_freq_factor": 0.0}, "greater than 0 and finite"),
    ({**LLAMA3, "rope_original_max_positions": 0}, "must be at least 1"),
    ({"rope_scaling_type": "yarn"}, "yarn needs to know from where it scales"),
    ({**YARN, "yarn_beta_slow": 50.0}, "greater than yarn_beta_slow = 50"),
    ({**YARN, "yarn_attention_factor": -1.0}, "greater than 0"),
    ({"rotary_interleaved": True, "position_embedding_type": "none"}, "only means something"),
    ({"relative_attention_num_buckets": 8}, "position_embedding_type = relative"),
    ({"add_attention_bias": True, "add_bias_linear": True}, "puts biases there already"),
    ({"add_mlp_bias": True, "add_bias_linear": True}, "puts biases there already"),
    ({"family": "bert", "qk_layernorm": True}, "family bert has nothing of the kind"),
    ({"family": "t5", "use_parallel_residual": True}, "family t5 has nothing of the kind"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_refused(changes: dict[str, Any], message: str) -> None:
    rope = {"position_embedding_type": "rope", "add_bias_linear": False}
    base = rope if any(name.startswith(("rope_scaling_t", "rotary")) for name in changes) else {}
    with pytest.raises(ConfigError, match=message):
        small_config(**{**base, **changes})


@pytest.mark.parametrize(("buckets", "far"), [(5, 128), (2, 128), (32, 16)])
def test_refused_buckets(buckets: int, far: int) -> None:
    with pytest.raises(ConfigError, match=r"relative_attention_(num|max).*Nearest"):
        small_config(
            position_embedding_type="relative",
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=far,
        )
