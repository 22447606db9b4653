"""What the benchmark of a training compares it with: the plain loop, the roofline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtk.benchmarks.plain_run import not_written, plain_model
from mtk.benchmarks.roofline import (
    SUSTAINED,
    attention_of,
    measure_roofline,
    not_counted,
    products_of,
)
from mtk.launch.process import Place
from mtk.models.build import build_model
from mtk.models.count import Flops, flops_per_token
from mtk.models.init import initialize
from mtk.training.loss import token_losses
from tests.benchmarks.tiny_training import EXPERTS, LLAMA, config

# -- the plain loop -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        {},
        {"activation": "gelu-tanh"},
        LLAMA,
        {"num_query_groups": 1, "position_embedding_type": "none", "add_bias_linear": False},
        {**LLAMA, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    ],
    ids=["GPT-2", "GPT-2 tanh", "Llama", "MQA", "Qwen"],
)
def test_the_plain_model_is_the_same_one(family: dict[str, Any]) -> None:
    given = config(**family)
    assert not_written(given) == ""
    model = build_model(given.model)
    initialize(model, given.model, 3)
    plain = plain_model(given.model, 3, torch.device("cpu"))
    tokens, labels = torch.randint(128, (2, 2, 128), generator=torch.Generator().manual_seed(0))
    expected = token_losses(model(tokens), labels).mean()
    assert plain(tokens, labels).item() == pytest.approx(expected.item(), abs=1e-5)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (EXPERTS, "a mixture of experts"),
        ({"hidden_dropout": 0.1}, "dropout"),
        ({"window_size": 8}, "windows"),
        ({"position_embedding_type": "alibi"}, "positions of kind alibi"),
        ({**LLAMA, "rotary_percent": 0.5}, "scaled, partial or interleaved rotation"),
        ({"activation": "relu"}, "activation relu"),
        ({"precision": "fp16"}, "fp16"),
        ({"reset_position_ids": True}, "documents kept apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_plain_loop_has_not(changes: dict[str, Any], named: str) -> None:
    assert not_written(config(**changes)) == f"the plain loop has none of this: {named}"


# -- the roofline -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [{}, LLAMA, EXPERTS, {**LLAMA, **EXPERTS}], ids=["GPT", "Llama", "MoE", "gated MoE"]
)
def test_products_have_the_flops_of_a_step(family: dict[str, Any]) -> None:
    model, samples = config(**family).model, 3
    assert not_counted(config(**family)) == ""
    products = sum(product.flops for product in products_of(model, samples))
    attention = attention_of(model, samples).flops
    per_token: Flops = flops_per_token(model)
    assert products + attention == pytest.approx(per_token.full * samples * model.seq_length)


@pytest.mark.parametrize("family", [LLAMA, EXPERTS], ids=["Llama", "MoE"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_product_is_timed(
    family: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUSTAINED, "cpu", 0.0)
    given = config(**family, precision=precision)
    found = measure_roofline(Place(), given)
    assert found.products == precision and found.kernels == {
        "forward": "default",
        "backward": "default",
    }
    assert all(part.seconds > 0 and part.count > 0 for part in found.parts)
    assert found.seconds == pytest.approx(sum(p.seconds * p.count for p in found.parts))
    # Both micro-batches of the step.
    flops = flops_per_token(given.model).full * 256
    assert sum(part.flops for part in found.parts) == pytest.approx(flops)


def test_what_has_no_roofline() -> None:
    assert not_counted(config(window_size=8)) == "not written for windows"
    given = config(nproc=2, tensor_model_parallel_size=2)
    assert not_counted(given) == "not written for models that are shared by ranks"
