"""The memory formulas of layers that follow a pattern, held to tensors that are really kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.plan import PlanConfig
from mtk.models.attention import sdpa_kernel
from mtk.models.count import parameter_count
from mtk.models.count_families import cross_attention
from mtk.models.layer import SingleBlock
from mtk.models.t5 import DecoderBlock
from mtk.parallel import planning
from mtk.parallel.recompute import _recompute_core
from tests.parallel.saved_bytes import saved_bytes

MODEL: dict[str, Any] = {
    "hybrid_layer_pattern": "M-M*M-ME",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_experts": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_state_dim": 24,
    "mamba_chunk_size": 32,
    "seq_length": 256,
    "vocab_size": 256,
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "untie_embeddings_and_output_weights": True,
    "precision": "fp32",
    "lr": 1e-4,
}
SIZES: list[dict[str, Any]] = [
    {},
    {"mamba_chunk_size": 128, "mamba_num_groups": 4},
    {"mamba_head_dim": 32, "mamba_state_dim": 48},
    {"mamba_num_heads": 24, "mamba_num_groups": 8, "mamba_chunk_size": 16},
]


def plan(**values: Any) -> PlanConfig:
    return make(PlanConfig, **{**MODEL, **values})


@pytest.mark.parametrize("granularity", [None, "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_mamba_layer_keeps_what_the_formula_says(
    sizes: dict[str, Any], precision: str, granularity: str | None
) -> None:
    config = plan(precision=precision, recompute_granularity=granularity, **sizes)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    layer = SingleBlock(config.model, "M", sdpa_kernel, None).to(dtype)
    if granularity is not None:
        _recompute_core(layer)
    x_BSE = torch.randn(1, 256, 64, dtype=dtype, requires_grad=True)
    kept = saved_bytes(lambda: layer(x_BSE), list(layer.parameters()))
    assert planning.layer_activations(config, "M") == pytest.approx(kept, rel=0.08)


T5: dict[str, Any] = {
    "family": "t5",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 256,
    "decoder_seq_length": 64,
    "vocab_size": 256,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "attention_backend": "flash",
    "precision": "fp32",
    "lr": 1e-4,
}


def test_a_layer_of_a_decoder_keeps_what_the_formula_says() -> None:
    """Its own tokens, fewer than the encoder's, and keys and values of those."""
    config = make(PlanConfig, **T5)
    assert planning.kinds_of(config, 0) == [[None] * 2 + [planning.DECODER] * 2]
    layer = DecoderBlock(config.model, sdpa_kernel)
    x_BTE, memory_BSE = torch.randn(1, 64, 64, requires_grad=True), torch.randn(1, 256, 64)
    kept = saved_bytes(
        lambda: layer(x_BTE, memory=(memory_BSE, None)), [memory_BSE, *layer.parameters()]
    )
    formula = planning.layer_activations(config, planning.DECODER)
    assert formula == pytest.approx(kept, rel=0.05)
    assert planning.logits(config) == 64 * 256 * 4
    stages = make(PlanConfig, **T5, pipeline_model_parallel_size=2, pipeline_split=(2, 2))
    encoder, decoder = (planning.stage_parameters(stages, stage)[0] for stage in range(2))
    assert decoder - encoder == pytest.approx(2 * cross_attention(config.model))


def test_stages_hold_their_own_kinds() -> None:
    config = plan(pipeline_model_parallel_size=2, pipeline_split=(5, 3))
    held = [planning.rank_memory(config, stage).parameters for stage in range(2)]
    assert sum(held) == pytest.approx(parameter_count(config.model))
    assert [planning.kinds_of(config, s) for s in range(2)] == [[list("M-M*M")], [list("-ME")]]
    each = {kind: planning.layer_activations(config, kind) for kind in "M-*E"}
    of_first = 2 * (3 * each["M"] + each["-"] + each["*"])
    assert planning.stage_activations(plan(
        pipeline_model_parallel_size=2, pipeline_split=(5, 3), global_batch_size=8
    ), 0) == pytest.approx(of_first)  # fmt: skip
    # Attention keeps more than its projections only for its scores, Mamba for its scan.
    bare = plan(recompute_granularity="selective")
    for kind, changes in (("*", True), ("M", True), ("-", False), ("E", False)):
        assert (planning.layer_activations(bare, kind) < each[kind]) == changes
    fast = plan(mamba_backend="mamba-ssm")
    assert planning.layer_activations(fast, "M") == planning.layer_activations(bare, "M")


def test_full_recomputation_makes_the_dearest_unit_anew() -> None:
    config = plan(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
    whole = {kind: planning.whole_layer_activations(config, kind) for kind in "M-*E"}
    dearest = max(whole["M"] + whole[other] for other in "-*E")
    states = 4 * planning.layer_input(config)
    assert planning.stage_activations(config, 0) == pytest.approx(states + dearest)


def test_dear_layers_make_short_stages() -> None:
    values = {"num_experts": None, "num_attention_heads": 1, "ffn_hidden_size": 8}
    splits = [
        planning.split_of(plan(**values, hybrid_layer_pattern=p, pipeline_model_parallel_size=2))
        for p in ("M" * 9 + "-" * 9, "-" * 9 + "M" * 9)
    ]
    assert splits[0][0] < 9 < splits[1][0]
