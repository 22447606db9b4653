"""What is measured is decoding as it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError
from serving.decode_bytes import cache_token_bytes, prompts_only, state_bytes
from serving.decode_speed import WARM_UP, measure_decode, prompts_of
from serving.generation import Decoder
from serving.paged.batch import PagedBatch
from serving.state_cache import StateStore
from tests.docs.shell_commands import fenced
from tests.serving.models import (
    HYBRID,
    LLAMA_LIKE,
    MAMBA,
    T5_10,
    T5_11,
    T5_MEGATRON,
    greedy_pair,
    greedy_without_cache,
    tiny_model,
)


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = PagedBatch.step

    def counted(batch: PagedBatch) -> Any:
        found = real(batch)
        steps.append(len(found))
        return found

    monkeypatch.setattr(PagedBatch, "step", counted)
    model = tiny_model(**LLAMA_LIKE)
    found = measure_decode(model, 3, 10, 40)
    # The first token of each is that of the prompt; every timed step brings one to all.
    assert len(found.step_seconds) == 40 - 1 - WARM_UP
    assert steps[-len(found.step_seconds) :] == [3] * len(found.step_seconds)
    assert found.tokens_per_second == pytest.approx(3 * 31 / sum(found.step_seconds))
    # Two layers of two groups of 8 channels, keys and values, in fp32.
    assert found.cache_token_bytes == 2 * 2 * 2 * 8 * 4
    embedding = model.embedding.tokens.weight.nbytes
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters()) - embedding
    assert (found.cache, found.state_bytes) == ("paged", 0) and found.blocks > 0


@pytest.mark.parametrize("kind", [MAMBA, HYBRID, T5_10, T5_11], ids=str)
def test_models_that_blocks_do_not_hold(kind: dict[str, Any]) -> None:
    """They decode what the model says, on dense rows."""
    model = tiny_model(**kind)
    found = measure_decode(model, 3, 10, 20, seed=7)
    assert (found.cache, found.blocks, found.graphs) == ("dense", 0, 0)
    assert len(found.step_seconds) == 20 - 1 - WARM_UP and min(found.step_seconds) > 0
    prompts = prompts_of(model.config.vocab_size or 0, 3, 10, 7)
    greedy = greedy_pair if kind.get("family") else greedy_without_cache
    assert [list(row) for row in found.tokens] == [greedy(model, p, 20) for p in prompts]


def test_dense_rows_of_any_model() -> None:
    model, dense = tiny_model(**LLAMA_LIKE), CacheConfig(kv_cache="dense")
    found, paged = (measure_decode(model, 2, 6, 12, options=o) for o in (dense, None))
    assert (found.cache, paged.cache) == ("dense", "paged") and found.tokens == paged.tokens
    assert found.cache_token_bytes == paged.cache_token_bytes


def test_what_is_kept_is_what_was_counted() -> None:
    """Bytes in the caches themselves."""
    model = tiny_model(**HYBRID)
    decoder = Decoder(model)
    with torch.inference_mode():
        decoder.prefill(decoder.cache.add_row(), [1, 2, 3])
    states = keys = 0
    for layer in decoder.cache._layers:
        if isinstance(layer, StateStore):
            parts = (layer.inputs_RWC, layer.states_RHPN)
            states += sum(part[0].nbytes for part in parts if part is not None)
        elif layer.keys_RGTD is not None:
            keys += 2 * layer.keys_RGTD[0, :, 0].nbytes
    assert states == state_bytes(model) and keys == cache_token_bytes(model)
    pair = tiny_model(**T5_MEGATRON)
    # Two layers of the decoder, two groups of 8 channels, keys and values, fp32.
    assert cache_token_bytes(pair) == 2 * 2 * 2 * 8 * 4
    read = {name for name, _ in pair.named_parameters() if not prompts_only(pair, name)}
    used = {"layers.2.", "layers.3.", "embedding.", "final_norm.", "output_bias", "decoder_bias"}
    assert all(name.startswith(tuple(used)) for name in read)
    assert not any(".cross_attention.key." in n or ".cross_attention.value." in n for n in read)
    assert {"layers.2.cross_attention.query.weight", "layers.3.mlp.up.weight"} <= read


@pytest.mark.parametrize(
    ("model", "new", "options", "words"),
    [
        (MAMBA, 40, CacheConfig(kv_cache="paged"), "paged cache"),
        (T5_11, 40, CacheConfig(kv_cache="paged"), "paged cache"),
        (MAMBA, WARM_UP, None, "new tokens"),
        ({}, WARM_UP, None, "new tokens"),
        ({}, 40, CacheConfig(kv_cache_tokens=64), "all sequences"),
    ],
)
def test_what_cannot_be_measured(model: dict[str, Any], new: int, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        measure_decode(tiny_model(**model), 3, 10, new, options=options)


@pytest.mark.parametrize(("example", "words"), [(0, "MiB of weights"), (1, "tokens/s")])
def test_the_examples_of_the_page_run(
    example: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[3] / "docs" / "engine.md"
    codes = [text for language, text in fenced(page) if language == "python"]
    assert len(codes) == 2
    exec(codes[example], {})
    assert words in capsys.readouterr().out
