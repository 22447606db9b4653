"""A shrunk configuration is small, legal, and has the same layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mtk.config import make
from mtk.config.float8 import STEP
from mtk.config.pretrain import PretrainConfig
from mtk.parallel.legal_layouts import data_parallel_size, legal_layouts, name, techniques
from mtk.verification.prepare import small

VALUES: dict[str, Any] = {
    "num_layers": 16,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "ffn_hidden_size": 4096,
    "seq_length": 1024,
    "vocab_size": 50257,
    "attention_dropout": 0.0,
    "micro_batch_size": 4,
    "global_batch_size": 64,
    "mock_data": True,
    "train_iters": 10,
    "lr": 1e-3,
    "save": "unused",
}
EXPERTS = {"num_experts": 8, "moe_ffn_hidden_size": 2048, "moe_layer_freq": 4}
MOE = {**EXPERTS, "add_bias_linear": False, "position_embedding_type": "rope"}


HYBRID = {
    "hybrid_layer_pattern": "M-M*M-ME" * 2,
    "num_experts": 8,
    "add_bias_linear": False,
    "position_embedding_type": "none",
}


T5 = {"family": "t5", "num_layers": 8, "num_query_groups": None, "decoder_seq_length": 256}


@pytest.mark.parametrize(
    "changes", [{}, MOE, HYBRID, T5], ids=["dense", "moe", "hybrid", "encoder-decoder"]
)
@pytest.mark.parametrize("world", [2, 8])
def test_every_layout_stays_legal(world: int, changes: dict[str, Any]) -> None:
    config = make(PretrainConfig, **(VALUES | changes))
    layouts = list(legal_layouts(world, config.model, config.batch))
    assert len(layouts) > 10
    for layout in layouts[:: 1 + len(layouts) // 60]:
        shrunk, _ = small(dataclasses.replace(config, parallel=layout))
        model = shrunk.model
        assert techniques(shrunk.parallel) == techniques(layout), name(layout)
        kept = ("num_attention_heads", "num_query_groups", "num_experts", "moe_router_topk")
        assert all(getattr(model, key) == getattr(config.model, key) for key in kept)
        assert model.num_layers <= 16 and model.hidden_size == 128 and model.seq_length <= 64
        assert shrunk.batch.full >= 2 * data_parallel_size(layout)


def test_what_counts_layers_shrinks_with_them() -> None:
    split = {"pipeline_model_parallel_size": 2, "pipeline_split": (5, 1, 4, 6), "nproc": 2}
    full = {"recompute_granularity": "full", "recompute_method": "block"}
    config = make(PretrainConfig, **VALUES, **split, **full, recompute_num_layers=5)
    shrunk, notes = small(config)
    assert shrunk.parallel.pipeline_split == (2, 1, 2, 2) and shrunk.model.num_layers == 7
    assert shrunk.parallel.recompute_num_layers == 2
    assert "7 layers" in notes[0]


@pytest.mark.parametrize(
    ("given", "made"), [((6, 10), (2, 2)), ((1, 15), (1, 3)), ((5, 1, 10), (2, 1, 3))]
)
def test_a_split_of_both_stacks_stays_one_of_equal_stacks(
    given: tuple[int, ...], made: tuple[int, ...]
) -> None:
    pipeline = {"pipeline_model_parallel_size": len(given), "pipeline_split": given}
    config = make(PretrainConfig, **(VALUES | T5), **pipeline, nproc=len(given))
    shrunk, _ = small(config)
    assert shrunk.parallel.pipeline_split == made
    assert shrunk.model.num_layers == sum(made) // 2


def test_a_small_model_is_not_made_larger() -> None:
    tiny = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "seq_length": 8}
    config = make(PretrainConfig, **{**VALUES, **tiny, "vocab_size": 11})
    shrunk, _ = small(config)
    model = shrunk.model
    assert (model.num_layers, model.hidden_size, model.ffn_size) == (1, 32, 32)
    assert (model.seq_length, model.vocab_size, model.head_size) == (8, 11, 2)


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "micro_batch_size": 1}])
def test_layers_in_fp8_stay_so(changes: dict[str, Any]) -> None:
    """In every layout they are large enough, and every rank's part is a multiple of 16."""
    values = {**VALUES, "precision": "bf16", "fp8_format": "hybrid", **changes}
    config = make(PretrainConfig, **values)
    layouts = legal_layouts(4, config.model, config.batch)
    # Those that delay weight gradients are not for FP8.
    whole = [x for x in layouts if x.pipeline_schedule not in ("zero-bubble", "zbv")]
    for layout in whole[::3]:
        shrunk, _ = small(dataclasses.replace(config, parallel=layout))
        model, tp = shrunk.model, layout.tensor_model_parallel_size
        assert model.hidden_size >= shrunk.precision.fp8_min_size
        heads, groups = model.num_attention_heads // tp, max(1, model.query_groups // tp)
        widths = (heads * model.head_size, groups * model.head_size, model.ffn_size // tp)
        assert not any(width % STEP for width in (*widths, model.hidden_size)), name(layout)
