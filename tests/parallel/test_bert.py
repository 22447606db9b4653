"""BERT in every kind of layout against one process."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.errors import ConfigError
from tests.parallel.layouts import configure, difference

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
BERT = {"model.family": "bert", "model.init_method_std": 0.1, "model.num_query_groups": None}
KINDS: dict[str, dict[str, Any]] = {
    "pre": BERT,
    "post": BERT | {"model.norm_placement": "post", "model.num_tokentypes": 3},
    "headless": BERT | {"model.bert_binary_head": False},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {TP: 2}),
        (2, {TP: 2, "sequence_parallel": True}),
        (2, {PP: 2}),
        (2, {PP: 2, "pipeline_schedule": "zbv"}),
        (2, {"data_parallel_sharding": "replicate"}),
        (2, {"data_parallel_sharding": "optimizer"}),
        (2, {"data_parallel_sharding": "full"}),
        (4, {TP: 2, "sequence_parallel": True, PP: 2, "pipeline_schedule": "interleaved"}),
        (4, {TP: 2, "sequence_parallel": True, "data_parallel_sharding": "full"}),
        (2, {PP: 2, "recompute_granularity": "full", "recompute_method": "uniform"}),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure("gpt2", world, KINDS[kind], **layout)).failures == []


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"family is bert.*Nearest: 1"):
        configure("gpt2", 2, BERT, context_parallel_size=2)
