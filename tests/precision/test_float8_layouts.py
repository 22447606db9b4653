"""FP8 over ranks: near one process in every layout, with copies that stay the same bytes."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.launch.local import launch
from mtk.launch.process import Place, join
from mtk.parallel.ranks import Ranks
from mtk.training.join import ranks_of
from mtk.verification.observe import Observation, observe, random_sample
from tests.precision.test_float8 import config

SMALL: dict[str, Any] = {
    "num_query_groups": 2,
    "activation": "swiglu",
    "ffn_hidden_size": 128,
    "vocab_size": 130,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "lr": 1e-3,
    "fp8_min_size": 16,
}
TP = {"tensor_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": TP,
    "tp, sequence, recomputed": {**TP, "sequence_parallel": True, **FULL},
    "pp": {"pipeline_model_parallel_size": 2, "recompute_granularity": "selective"},
    "cp": {"context_parallel_size": 2},
    "dp, full": {"data_parallel_sharding": "full"},
    "dp, replicate": {"data_parallel_sharding": "replicate"},
}
STEPS = 2


def observed(place: Place, recipe: str) -> dict[str, Observation]:
    found = {}
    with join(place, 60.0) as trace:
        for name, layout in LAYOUTS.items():
            own = config(**SMALL, **layout, nproc=2, fp8_recipe=recipe)
            ranks = ranks_of(place, own, trace)
            found[name] = observe(own, random_sample(own), ranks, STEPS)
    return found


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_layouts_follow_one_process(recipe: str) -> None:
    single = config(**SMALL, fp8_recipe=recipe)
    expected = observe(single, random_sample(single), Ranks(), STEPS)
    for name, found in launch(observed, (recipe,), 2, timeout=120.0).items():
        assert found.loss == pytest.approx(expected.loss, rel=5e-4), name
        # A part of a tensor has another scale than the whole of it.
        assert found.norm == pytest.approx(expected.norm, rel=2e-2), name
        assert found.drifted == (), name
