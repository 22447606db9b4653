"""How large the cache is, and which model gets which."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError
from serving.errors import NotReadyError
from serving.paged.budget import paged_settings
from serving.paged.layers import cache_shape
from serving.requests import GenerationRequest
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from stages.serve import paged_cache
from tests.serving.models import LLAMA_LIKE, MAMBA, ByteTokenizer, greedy_without_cache, tiny_model

# Two layers of two groups of 8 channels, keys and values, in fp32, 16 tokens.
BLOCK_BYTES = 2 * 2 * 2 * 8 * 4 * 16


def settings(**options: Any) -> Any:
    model = tiny_model(**LLAMA_LIKE)
    return paged_settings(model, CacheConfig(**options), rows=4, context=90)


def test_sizes() -> None:
    assert cache_shape(tiny_model(**LLAMA_LIKE)).block_bytes == BLOCK_BYTES
    assert settings().blocks == 4 * 6 and settings().context == 90
    assert settings(kv_cache_tokens=100).blocks == 6
    assert settings(kv_cache_gib=10 * BLOCK_BYTES / 2**30).blocks == 10
    assert not settings().ahead and not settings().graphs


def test_a_small_cache_lowers_the_context() -> None:
    assert settings(kv_cache_tokens=50).context == 48


@pytest.mark.parametrize("gib", [1e-9, BLOCK_BYTES / 2**30 / 2])
def test_a_cache_that_holds_nothing(gib: float) -> None:
    with pytest.raises(ConfigError, match=f"16 tokens \\({BLOCK_BYTES} bytes\\)"):
        settings(kv_cache_gib=gib)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_tokens": 15}, "a block"),
        ({"max_batched_tokens": 0}, "a block"),
        ({"kv_cache_gib": 0.0}, "greater than 0"),
        ({"kv_cache_gib": float("nan")}, "greater than 0"),
        ({"kv_cache_gib": 1.0, "kv_cache_tokens": 64}, "in another unit"),
        ({"kv_cache": "dense", "kv_cache_tokens": 64}, "--kv-cache dense"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(CacheConfig, **options)


def test_which_model_gets_which_cache() -> None:
    auto, paged, dense = (CacheConfig(kv_cache=kind) for kind in ("auto", "paged", "dense"))
    plain, states = tiny_model(), tiny_model(**MAMBA)
    assert paged_cache(auto, plain) is auto and paged_cache(paged, plain) is paged
    assert paged_cache(dense, plain) is None and paged_cache(auto, states) is None
    with pytest.raises(ConfigError, match="--kv-cache dense"):
        paged_cache(paged, states)


def test_an_engine_short_of_blocks_answers_all() -> None:
    """One sequence of the context fits, several do not: they wait and lose blocks, and all end."""
    model, prompt = tiny_model(), tuple(b"a text")
    engine = TorchEngine(
        model, ByteTokenizer(), context=90, max_batch_size=5, paged=CacheConfig(kv_cache_tokens=96)
    )
    request = GenerationRequest(
        prompts=(prompt,), max_tokens=80, sampling=SamplingParams(temperature=0)
    )
    try:
        tickets = [engine.submit(request) for _ in range(8)]
        expected = greedy_without_cache(model, prompt, 80)
        for ticket in tickets:
            assert ticket.wait(60)
            assert list(ticket.outputs()[0].tokens) == expected
        assert engine.stats().cache.preemptions > 0
        assert engine.stats().cache.blocks_used == 0
    finally:
        engine.close(10)
    with pytest.raises(NotReadyError):
        engine.submit(request)


def test_joined_matrices_are_no_second_copy() -> None:
    model = tiny_model(**LLAMA_LIKE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    TorchEngine(model, ByteTokenizer(), context=90, paged=CacheConfig()).close(10)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    attention = model.layers["0"].attention
    parts = (attention.query, attention.key, attention.value)
    assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
