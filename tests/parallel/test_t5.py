"""T5 in every kind of layout against one process."""

from __future__ import annotations

from typing import Any

import pytest

from mtk.errors import ConfigError
from tests.parallel.layouts import configure, difference

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
T5 = {
    "model.family": "t5",
    "model.num_layers": 2,
    "model.decoder_seq_length": 8,
    "model.init_method_std": 0.1,
}
KINDS: dict[str, dict[str, Any]] = {
    "megatron": T5 | {"model.num_query_groups": None},
    "published": T5
    | {
        "model.position_embedding_type": "relative",
        "model.relative_attention_num_buckets": 8,
        "model.relative_attention_max_distance": 12,
        "model.normalization": "RMSNorm",
        "model.activation": "relu",
        "model.add_bias_linear": False,
        "model.softmax_scale": 1.0,
        "model.scale_tied_output": True,
    },
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {TP: 2}),
        (2, {TP: 2, "sequence_parallel": True}),
        (2, {PP: 2}),
        (2, {PP: 2, "pipeline_split": (1, 3)}),
        (2, {PP: 2, "pipeline_schedule": "zbv"}),
        (2, {PP: 2, "pipeline_schedule": "zero-bubble"}),
        (2, {"data_parallel_sharding": "replicate"}),
        (2, {"data_parallel_sharding": "optimizer"}),
        (2, {"data_parallel_sharding": "full"}),
        (4, {TP: 2, "sequence_parallel": True, PP: 2, "pipeline_schedule": "interleaved"}),
        (4, {PP: 4}),
        (4, {TP: 2, "sequence_parallel": True, "data_parallel_sharding": "full"}),
        (2, {PP: 2, "recompute_granularity": "full", "recompute_method": "uniform"}),
        (
            1,
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 3,
            },
        ),
    ],
    ids=str,
)
def test_equals_one_process(kind: str, world: int, layout: dict[str, Any]) -> None:
    assert difference(configure("gpt2", world, KINDS[kind], **layout)).failures == []


def test_sequence_parallelism_needs_rows_of_the_decoder() -> None:
    changes = KINDS["published"] | {"model.decoder_seq_length": 7}
    with pytest.raises(ConfigError, match=r"decoder_seq_length = 7.*Nearest: 6 or 8"):
        configure("gpt2", 2, changes, **{TP: 2, "sequence_parallel": True})
