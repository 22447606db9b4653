"""A Mamba layer's state: begun anew, moved, copied and continued; never another sequence's."""

from __future__ import annotations

import math

import pytest
import torch

from mtk.models.gpt import GPT
from serving.generation import Decoder
from serving.kv_cache import KVCache
from serving.state_cache import StateStore
from tests.serving.models import HYBRID, MAMBA, tiny_model

PROMPT, OTHER = list(b"The quick brown fox"), list(b"12")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=[MAMBA, HYBRID], ids=["mamba", "hybrid"])
def model(request: pytest.FixtureRequest) -> GPT:
    return tiny_model(**request.param)


@torch.inference_mode()
def alone(model: GPT, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0, -1]  # type: ignore[no-any-return]


def stores(decoder: Decoder) -> list[StateStore]:
    return [layer for layer in decoder.cache._layers if isinstance(layer, StateStore)]


@torch.inference_mode()
def test_nothing_of_an_ended_sequence_is_left(model: GPT) -> None:
    decoder = Decoder(model)
    for _ in range(2):
        decoder.prefill(decoder.cache.add_row(), PROMPT)
    for store in stores(decoder):
        assert store.states_RHPN is not None and store.inputs_RWC is not None
        store.states_RHPN[1], store.inputs_RWC[1] = math.nan, math.nan
    decoder.cache.free_row(1)
    logits_V, _ = decoder.prefill(decoder.cache.add_row(), OTHER)
    torch.testing.assert_close(logits_V, alone(model, OTHER), **TOLERANCE)
    logits_BV = decoder.decode([65, 66])
    torch.testing.assert_close(logits_BV[0], alone(model, [*PROMPT, 65]), **TOLERANCE)
    torch.testing.assert_close(logits_BV[1], alone(model, [*OTHER, 66]), **TOLERANCE)


@torch.inference_mode()
def test_beams_are_copies_that_part(model: GPT) -> None:
    decoder = Decoder(model)
    decoder.prefill(decoder.cache.add_row(), PROMPT)
    decoder.cache.select_rows([0, 0, 0])
    decoder.decode([65, 66, 67])
    decoder.cache.select_rows([2, 0, 2, 1])
    found_BV = decoder.decode([68, 69, 70, 71])
    for row, end in enumerate(([67, 68], [65, 69], [67, 70], [66, 71])):
        torch.testing.assert_close(found_BV[row], alone(model, [*PROMPT, *end]), **TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [(1, 18), (5, 13), (17, 1, 1)])
def test_a_state_is_continued_by_any_number_of_tokens(cuts: tuple[int, ...]) -> None:
    model = tiny_model(**MAMBA)
    cache = KVCache(2, model.stateful_layers)
    row, place = cache.add_row(), 0
    for length in cuts:
        tokens_BS = torch.tensor([PROMPT[place : place + length]])
        logits_BSV = model(tokens_BS, caches=cache.prefill_views(row))
        place += length
        cache.lengths[row] = place
    torch.testing.assert_close(logits_BSV[0, -1], alone(model, PROMPT[:place]), **TOLERANCE)


@torch.inference_mode()
def test_a_state_does_not_grow() -> None:
    decoder = Decoder(tiny_model(**MAMBA))
    decoder.prefill(decoder.cache.add_row(), PROMPT)
    before = [tuple(store.states_RHPN.shape) for store in stores(decoder)]  # type: ignore[union-attr]
    for _ in range(5):
        decoder.decode([65])
    assert before == [(1, 8, 8, 12)] * 2
    assert [tuple(store.states_RHPN.shape) for store in stores(decoder)] == before  # type: ignore[union-attr]
